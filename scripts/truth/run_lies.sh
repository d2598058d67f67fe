#!/usr/bin/env bash
# Pictures under wrong captions: does a ranking look at the picture? On small models that have learned the lies, and on
# one that has not; the last line of output is one JSON object.
# RETRAIN=1 first trains the models that have no presences yet, in TRUTH_DIR: hours; it goes on where it stopped.
# Example, two methods: METHODS=concept_trak,d_trak bash scripts/truth/run_lies.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb truth --test lies "$@"
