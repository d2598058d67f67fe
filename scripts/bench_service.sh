#!/usr/bin/env bash
# Load a service on loopback: 8 clients, 200 questions, then the same again; the last line of output is one JSON object.
# Example, a quick look: bash scripts/bench_service.sh --clients 2 --requests 10
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_verb bench-service "$@"
