#!/usr/bin/env bash
# Compute the projected train gradients of the emoji benchmark, shard by shard; a second call goes on where the first stopped.
# Example: GRAD_DIR=grads NUM_SPLIT=8 SHARDS=0-3 bash scripts/emoji/run_train_grad.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb train-grad --benchmark emoji "$@"
