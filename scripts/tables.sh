#!/usr/bin/env bash
# The figures of every committed table, beside chance, what text alone finds and the paper; experiments/README.md quotes it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
ensure_env
run_cli tables "$@"
