#!/usr/bin/env bash
# Synthetic: generate, train, classify, rows, attribute, table; the last line of output is one JSON object. Every stage goes on
# where it stopped; STAGE=train ends after that stage. 2 x 2 with a red triangle held out, then 4 x 4 with four pairs held out.
# QUICK=1 takes two minutes and shows only that everything runs. Example, other pictures: SHAPES=triangle,circle,hexagon
# COLORS=red,blue,pink HELD_OUT="triangle red|hexagon pink" WORK=/tmp/mine BENCHES=synthetic bash scripts/synthetic/run_all.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
labelled "${BENCHES:-synthetic,synthetic_4x4}" "$@"
