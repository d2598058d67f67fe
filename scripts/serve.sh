#!/usr/bin/env bash
# Answer questions over HTTP, one model in memory, until Ctrl-C; a form for the browser at the address that is printed.
# Example, for other machines: API_TOKEN=$(openssl rand -hex 16) LISTEN_HOST=0.0.0.0 LISTEN_PORT=8080 bash scripts/serve.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
in_place=exec
run_verb serve --benchmark emoji "$@"
