#!/usr/bin/env bash
# Your own pictures: say what it will take, encode them, compute their train gradients, attribute PROMPT, and make the explorer of
# all answers. Every step goes on where it stopped; a picture added later costs one row.
# Examples: PROMPT="a corgi in a park" TARGET_CONCEPTS=corgi bash scripts/abc/run_own_data.sh my_pictures
#           SD_MODEL_PATH=data/emoji/pipeline PROMPT="a cat" TARGET_CONCEPTS=cat bash scripts/abc/run_own_data.sh my_pictures
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
example='PROMPT="a corgi in a park" TARGET_CONCEPTS=corgi bash scripts/abc/run_own_data.sh my_pictures'
[ $# -ge 1 ] && [ -d "$1" ] || die "give a folder of pictures with metadata.jsonl, metadata.csv or captions.txt: $example"
[ -n "${PROMPT:-}" ] && [ -n "${TARGET_CONCEPTS:-}" ] || die "set PROMPT, what to generate, and TARGET_CONCEPTS, words of it: $example"
case "$1" in /*) folder=$1 ;; *) folder=./$1 ;; esac # or `-` and `-P` would mean something to cd
folder=$(cd "$folder" && pwd && echo /) # a name may end in the line breaks that $() takes away
folder=${folder%$'\n'/}
shift
name=${folder##*/}-$(printf '%s' "$folder" | $(sha256_tool) | cut -c1-10) # two folders of one name share nothing
export DATA_DIR=${DATA_DIR-$ROOT/experiments/own/results/data/$name}
export GRAD_DIR=${GRAD_DIR-$ROOT/experiments/own/results/grads/$name}
SOURCE_DIR=$folder run_verb estimate --benchmark own "$@"
SOURCE_DIR=$folder run_verb prepare --benchmark own "$@"
run_verb train-grad --benchmark own "$@"
run_verb attribute --benchmark own "$@"
run_verb explore --benchmark own "$@"
