#!/usr/bin/env bash
# Does an edit of the weights erase a concept, and only that? Objects and styles of the embedded model, judged; the last line is one JSON object.
# JUDGED: pictures of the target a headline cell. It goes on where it stopped. Example, quick: JUDGED=8 NUM_QUERIES=1 bash scripts/cad/run_eval.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb cad-eval --benchmark emoji "$@"
