#!/usr/bin/env bash
# Recall@10 and mAP of the exemplars of the tasks TASK_IDX; computes the rows that are missing. The last line printed is JSON.
# Example: TASK_IDX=0-47 bash scripts/abc/run_eval.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb evaluate-tasks --benchmark abc "$@"
