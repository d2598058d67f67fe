#!/usr/bin/env bash
# Train gradients: NUM_SPLIT shards, those of SHARDS, on GPU_ID, on the GPUs of GPU_IDS, or on the CPU; a second call goes on.
# Example: GPU_IDS="0 1 2 3" bash scripts/abc/run_train_grad.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb train-grad --benchmark abc "$@"
