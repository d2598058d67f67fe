#!/usr/bin/env bash
# Drawn faces with exact attributes: generate, train, classify, rows, attribute, table; the last line of output is one JSON
# object. Every stage goes on where it stopped; STAGE=train ends after that stage; QUICK=1 shows only that everything runs.
# Needs the extra `faces` (pip install -e '.[faces]'). Example: ATTRIBUTES=hair,hat HELD_OUT="hat bald" WORK=/tmp/mine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
labelled faces "$@"
