#!/usr/bin/env bash
# Retrained without the pictures that taught them, do the weights that an edit takes lose a concept's score? Small models retrained, edited and both.
# Trains up to three of them in TRUTH_DIR, as many at a time as there are cores; goes on where it stopped. The last line is one JSON object.
# Example: bash scripts/cad/run_counterfactual.sh    # quick: REPLAY_STEPS=20, four trainings of 20 steps
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb cad-counterfactual --benchmark emoji "$@"
