#!/usr/bin/env bash
# The second query, many queries together, rows in bfloat16: seconds and ratios; the last line of output is one JSON object. --workdir FOLDER keeps the synthetic rows (7 GB) and what is computed of them.
# Example, quick: bash scripts/bench_scoring.sh --parts small,bf16
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_verb bench-scoring "$@"
