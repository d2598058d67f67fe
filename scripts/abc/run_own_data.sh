#!/usr/bin/env bash
# Your own pictures: encode them, compute their train gradients, attribute PROMPT. Every step goes on where it stopped.
# Example: PROMPT="a corgi in a park" TARGET_CONCEPTS=corgi bash scripts/abc/run_own_data.sh my_pictures
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
[ $# -ge 1 ] && [ -d "$1" ] || die "give a folder of pictures with metadata.jsonl, metadata.csv or captions.txt"
[ -n "${PROMPT:-}" ] && [ -n "${TARGET_CONCEPTS:-}" ] || die "set PROMPT, what to generate, and TARGET_CONCEPTS, words of it"
folder=$(cd "$1" && pwd)
shift
name=$(basename "$folder")-$(printf '%s' "$folder" | $(sha256_tool) | cut -c1-10) # two folders of one name share nothing
export DATA_DIR=${DATA_DIR:-$ROOT/experiments/own/results/data/$name}
export GRAD_DIR=${GRAD_DIR:-$ROOT/experiments/own/results/grads/$name}
SOURCE_DIR=$folder run_verb prepare --benchmark own "$@"
run_verb train-grad --benchmark own "$@"
run_verb attribute --benchmark own "$@"
