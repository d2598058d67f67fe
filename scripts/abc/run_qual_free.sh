#!/usr/bin/env bash
# Attribute a picture of PROMPT: which training images taught each of TARGET_CONCEPTS?
# Example: PROMPT="Pikachu in the style of Pablo Picasso" TARGET_CONCEPTS="Pikachu,Pablo Picasso" bash scripts/abc/run_qual_free.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb attribute --benchmark abc "$@"
