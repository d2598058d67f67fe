#!/usr/bin/env bash
# Fetch the released train gradients (16 shards, 13.1 GB) from the Hugging Face hub and make them a store; a second call goes on
# where the first stopped. HF_TOKEN and HF_ENDPOINT are used if set.
# Example: GRAD_ROOT=/disk/grads MAX_WORKERS=4 bash scripts/abc/download_train_grad.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
ensure_env
flags_from_env HF_REPO_ID REPO_TYPE TRAIN_GRAD_NAME PATH_IN_REPO GRAD_ROOT MAX_WORKERS
run_cli download-train-grad ${FLAGS[@]+"${FLAGS[@]}"} "$@"
