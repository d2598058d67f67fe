#!/usr/bin/env bash
# Amplify a concept by taking away the weights that work against it; a page with layers, and pictures before and after.
# Example: CONCEPT=cat RATIO=0.05 SELECTION=cross_attention bash scripts/cad/run_amplify.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb cad-amplify --benchmark emoji "$@"
