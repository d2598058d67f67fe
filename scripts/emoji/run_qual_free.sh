#!/usr/bin/env bash
# Attribute the concepts of one prompt on the emoji benchmark: generates the query, ranks the training images, writes report.html.
# Example: PROMPT="a cat in the style of openmoji line" TARGET_CONCEPTS="cat|openmoji line" bash scripts/emoji/run_qual_free.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb attribute --benchmark emoji "$@"
