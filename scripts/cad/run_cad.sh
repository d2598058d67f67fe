#!/usr/bin/env bash
# Which weights carry a concept; a page with layers.
# Example: CONCEPT=cat RATIO=0.05 SELECTION=cross_attention bash scripts/cad/run_cad.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb cad --benchmark emoji "$@"
