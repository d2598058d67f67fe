#!/usr/bin/env bash
# Measure the index against the exact scan, on the embedded rows and on a million synthetic ones (9 GB of disk; goes on after
# a kill); the last line of output is one JSON object.
# Example, a small one: bash scripts/bench_index.sh --rows 20000 --workdir /tmp/index
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_verb bench-index --benchmark emoji "$@"
