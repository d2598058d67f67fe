#!/usr/bin/env bash
# Train the embedded Stable Diffusion pipeline on the train split (hours on two cores); a second call resumes.
# Example: bash scripts/emoji/train_model.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb train-model --benchmark emoji "$@"
