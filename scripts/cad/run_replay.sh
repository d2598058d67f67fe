#!/usr/bin/env bash
# Which training pictures put a concept's score into the weights, exactly: the small model's training is replayed (and first done, where that is
# missing). Goes on where it stopped; the last line is one JSON object.
# Example: CONCEPT=rocket bash scripts/cad/run_replay.sh    # quick: REPLAY_STEPS=20, a training of 20 steps
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb cad-replay --benchmark emoji "$@"
