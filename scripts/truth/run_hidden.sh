#!/usr/bin/env bash
# Captions that leave a concept out: is it found in the pictures, and did they teach it? The last line of output is one JSON object.
# RETRAIN=1 first trains the models that have no presences yet, in TRUTH_DIR: hours; it goes on where it stopped.
# Example, two methods: METHODS=concept_trak,d_trak bash scripts/truth/run_hidden.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb truth --test hidden "$@"
