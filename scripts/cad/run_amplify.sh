#!/usr/bin/env bash
# Amplify a concept by taking away the weights that work against it; a page with layers, and pictures before and after.
# Without SELECTION and RATIO it follows the published rule, which helps what was rare in training (run_rare.sh).
# Example: CONCEPT=cat RATIO=0.05 SELECTION=cross_attention bash scripts/cad/run_amplify.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb cad-amplify --benchmark emoji "$@"
