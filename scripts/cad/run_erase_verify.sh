#!/usr/bin/env bash
# Erase a concept and prove it: searches an edit of TARGET_UA that keeps MIN_RETENTION of the rest, confirms it on other pictures, probes behind the
# prompt, and writes a certificate; or says that no edit does, and shows the best. Goes on where it stopped; the last line is one JSON object.
# Example: CONCEPT=rocket TARGET_UA=0.9 MIN_RETENTION=0.9 bash scripts/cad/run_erase_verify.sh    # quick: JUDGED=16
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb cad-verify --benchmark emoji "$@"
