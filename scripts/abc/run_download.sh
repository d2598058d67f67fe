#!/usr/bin/env bash
# Fetch the AbC benchmark's assets from the Hugging Face hub into data/abc and unpack them; a second call goes on where the first
# stopped. HF_TOKEN and HF_ENDPOINT are used if set.
# Example: DATA_DIR=/disk/abc PARTS="latents laion_subset" MAX_WORKERS=4 bash scripts/abc/run_download.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
ensure_env
flags_from_env DATA_DIR PARTS MAX_WORKERS
run_cli download-abc ${FLAGS[@]+"${FLAGS[@]}"} "$@"
