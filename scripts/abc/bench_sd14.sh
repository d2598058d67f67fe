#!/usr/bin/env bash
# The engine on the true architecture of Stable Diffusion v1.4, random weights: seconds, memory, forward-equivalents, GPU-hours (computed).
# Example: bash scripts/abc/bench_sd14.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb bench-sd14 --benchmark abc "$@"
