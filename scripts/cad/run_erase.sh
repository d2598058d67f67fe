#!/usr/bin/env bash
# Erase a concept from the weights; a page with layers, and pictures before and after.
# Example: CONCEPT=cat RATIO=0.05 SELECTION=cross_attention bash scripts/cad/run_erase.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb cad-erase --benchmark emoji "$@"
