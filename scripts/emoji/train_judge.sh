#!/usr/bin/env bash
# Train the judge, a small CNN that names object and style; it measures the embedded model (scripts/emoji/run_judge.sh).
# Example: bash scripts/emoji/train_judge.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb train-judge --benchmark emoji "$@"
