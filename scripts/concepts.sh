#!/usr/bin/env bash
# List the concepts that the pictures' labels name: words for TARGET_CONCEPTS. Without labels, the words of most captions.
# Example, your own pictures: DATA_DIR=my_pictures bash scripts/concepts.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run_verb concepts --benchmark emoji "$@"
