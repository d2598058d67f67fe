#!/usr/bin/env bash
# Concept gradients of the tasks TASK_IDX.
# Example: TASK_IDX=0-47 bash scripts/abc/run_test_grad.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb test-grad --benchmark abc "$@"
