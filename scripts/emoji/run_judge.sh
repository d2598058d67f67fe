#!/usr/bin/env bash
# Measure the embedded model: the judge names object and style of what it draws, for seen and for held-out cells.
# Example: NUM_QUERIES=16 bash scripts/emoji/run_judge.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb judge-model --benchmark emoji "$@"
