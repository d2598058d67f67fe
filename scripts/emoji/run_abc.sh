#!/usr/bin/env bash
# AbC in small: tokens learned from art that the embedded model never saw, and who finds that art among its training pictures. The
# last line of output is one JSON object. Some 40 minutes of one core; a killed run goes on.
# A quick look: METHODS=trak,concept_trak bash scripts/emoji/run_abc.sh --tokens 1
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb small-abc "$@"
