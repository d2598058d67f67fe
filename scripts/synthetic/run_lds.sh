#!/usr/bin/env bash
# Do summed scores predict how much a model knows that learned only a part of the pictures? 64 subsets of the 4 x 4 pictures x 2
# seeds; the last line of output is one JSON object. RETRAIN=1 first trains what has no presences yet: 40 minutes of one core.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
STAGE=lds labelled "${BENCHES:-synthetic_4x4}" "$@"
