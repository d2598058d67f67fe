#!/usr/bin/env bash
# Component scores on the true architecture of Stable Diffusion v1.4, random weights: seconds, peak memory; it needs 8 GB with SELECTION=paper.
# Example: SELECTION=paper bash scripts/cad/bench_sd14.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb cad-bench-sd14 --benchmark emoji "$@"
