#!/usr/bin/env bash
# Speed and memory of the engine against the reference recipe done literally; the last line of output is one JSON object.
# Example, scoring from disk at full size: bash scripts/bench.sh --n 100000 --k 32768
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_verb bench "$@"
