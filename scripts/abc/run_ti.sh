#!/usr/bin/env bash
# Learn the token <new1> by Textual Inversion: of every model among the tasks TASK_IDX, or of the pictures in the folder IMAGES with
# PROMPT, which must hold the token. A second call goes on where the first stopped.
# Examples: TASK_IDX=0-399 bash scripts/abc/run_ti.sh
#           IMAGES=my_pictures PROMPT="A photo of a <new1> cup" OUT_DIR=my_token bash scripts/abc/run_ti.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
SETTING_VARIABLES+=(IMAGES NEW_TOKEN INIT_WORD STEPS LEARNING_RATE RANDOM_FLIP OUT_DIR)
run_verb train-token --benchmark abc "$@"
