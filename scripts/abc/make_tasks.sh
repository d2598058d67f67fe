#!/usr/bin/env bash
# Write TASK_JSON, the list of 400 tasks, from the JSON files of the release under DATA_DIR.
# Example: bash scripts/abc/make_tasks.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb make-tasks --benchmark abc "$@"
