#!/usr/bin/env bash
# Encode a folder of pictures and captions into DATA_DIR: latents (mirrored ones after the originals) and text embeddings.
# Example: SOURCE_DIR=my_pictures DATA_DIR=my_arrays bash scripts/abc/run_prepare.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
run_verb prepare --benchmark own "$@"
