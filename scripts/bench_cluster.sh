#!/usr/bin/env bash
# What a Ray cluster costs over local runs, and 10^8 rows on 1,000 workers simulated; the last line of output is one JSON object.
# Example: bash scripts/bench_cluster.sh --bench-rows 512 --repeats 5
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
unset RAY_ADDRESS # the cluster is this machine's own
run_verb bench-cluster "$@"
