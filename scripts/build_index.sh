#!/usr/bin/env bash
# Make the index that SEARCH=index searches, beside the rows; run it again when shards were added.
# Example: bash scripts/build_index.sh && SEARCH=index bash scripts/demo.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_verb build-index --benchmark emoji "$@"
