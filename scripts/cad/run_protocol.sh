#!/usr/bin/env bash
# The published protocols for an edited Stable Diffusion: PROTOCOL=objects|nudity|styles|retention, EDITS of run_erase.sh; the last line is one JSON object.
# It goes on where it stopped. Example: PROTOCOL=objects EDITS=experiments/own/results/cad/latest/edit.safetensors bash scripts/cad/run_protocol.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb cad-protocol --benchmark own "$@"
