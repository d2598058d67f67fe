#!/usr/bin/env bash
# Train gradients with unit norm on four GPUs: run_train_grad.sh with GPU_IDS="0 1 2 3".
# Example: bash scripts/abc/run_train_grad_norm_4gpu.sh
set -euo pipefail
export GPU_IDS=${GPU_IDS-0 1 2 3} NORMALIZE=${NORMALIZE-1}
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_train_grad.sh" "$@"
