#!/usr/bin/env bash
# Training pictures whose caption the model contradicts, the worst first: a table, a picture grid, a CSV file.
# Example, for other pictures: DATA_DIR=my_pictures bash scripts/emoji/run_suspects.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb suspects --benchmark emoji "$@"
