#!/usr/bin/env bash
# Train the judge, a small CNN that names object and style; it measures the embedded model (scripts/emoji/run_judge.sh).
# It learns from all art of the eight styles, 364 objects, which build_data.sh makes first (needs npm); DATA_DIR: other pictures.
# Example: bash scripts/emoji/train_judge.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
if [ -z "${DATA_DIR+set}" ]; then
    export DATA_DIR=$ROOT/data/emoji-s8-n364
    [ -f "$DATA_DIR/tree.sha256" ] || PRESET=s8-n364 OUT_DIR=$DATA_DIR bash "$ROOT/scripts/emoji/build_data.sh"
fi
run_verb train-judge --benchmark emoji "$@"
