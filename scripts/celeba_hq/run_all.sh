#!/usr/bin/env bash
# CelebA-HQ: generate (reads CelebAMask-HQ as downloaded, SOURCE=folder), train, classify, rows, attribute, table; the last line
# of output is one JSON object. Every stage goes on where it stopped; STAGE=train ends after that stage.
# Example: SOURCE=~/CelebAMask-HQ ATTRIBUTES=Smiling,Eyeglasses HELD_OUT="Smiling Eyeglasses" bash scripts/celeba_hq/run_all.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
labelled celeba_hq "$@"
