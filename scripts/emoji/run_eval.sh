#!/usr/bin/env bash
# Recall@10 and mAP of every method and control on held-out and seen cells; the last line of output is one JSON object.
# Example, a quick look: NUM_QUERIES=16 bash scripts/emoji/run_eval.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb evaluate --benchmark emoji "$@"
