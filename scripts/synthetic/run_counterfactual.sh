#!/usr/bin/env bash
# Without the pictures that a ranker names, does the model lose the concept? The last line of output is one JSON object.
# RETRAIN=1 first trains what has no presences yet: ten minutes of one core.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
STAGE=counterfactual labelled "${BENCHES:-synthetic_4x4}" "$@"
