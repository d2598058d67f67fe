#!/usr/bin/env bash
# Do summed scores predict how much a model knows that learned only a part of the pictures?; the last line of output is one JSON object.
# RETRAIN=1 first trains the models that have no presences yet, in TRUTH_DIR: hours; it goes on where it stopped.
# Example, two methods: METHODS=concept_trak,d_trak bash scripts/truth/run_lds.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb truth --test lds "$@"
