#!/usr/bin/env bash
# Train rows of the exemplars of the tasks TASK_IDX.
# Example: TASK_IDX=0-47 bash scripts/abc/run_task_grad.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb task-grad --benchmark abc "$@"
