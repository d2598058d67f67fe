#!/usr/bin/env bash
# Does amplifying help where a model learned too little? A small model is trained on data thinned to two pictures of each of 16 objects
# (eight minutes of one core, in TRUTH_DIR); eight of them choose a plan, eight are reported. Goes on where it stopped; the last line is one JSON object.
# Example: bash scripts/cad/run_rare.sh    # quick: REPLAY_STEPS=20, a training of 20 steps
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb cad-rare --benchmark emoji "$@"
