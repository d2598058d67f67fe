#!/usr/bin/env bash
# Train the judge, a small CNN that names object and style, and measure the embedded model with it.
# Example: bash scripts/emoji/train_judge.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb train-judge --benchmark emoji "$@"
