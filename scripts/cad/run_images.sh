#!/usr/bin/env bash
# Images x weights: which training pictures put a concept into which weights; a table, a heat map, an array.
# Example: CONCEPT=cat SELECTION=cross_attention GRANULARITY=head bash scripts/cad/run_images.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb cad-images --benchmark emoji "$@"
