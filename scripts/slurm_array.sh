#!/usr/bin/env bash
#SBATCH --job-name=train-grad
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --requeue
# An array of Slurm jobs that fill one store, as an example to change: array task i of n makes the shards i, i + n, ... of NUM_SPLIT.
# A task that dies or is requeued goes on where it stopped. GRAD_DIR must be one place for all: a shared disk, or s3://bucket/prefix.
#   NUM_SPLIT=64 sbatch --array=0-15 scripts/slurm_array.sh          BENCHMARK=own ... for other defaults
set -euo pipefail
# Slurm runs a copy of this file; the checkout is where sbatch was called.
unset CDPATH
cd -- "${SLURM_SUBMIT_DIR:-$(dirname -- "${BASH_SOURCE[0]}")/..}"
source scripts/lib.sh
: "${SLURM_ARRAY_TASK_ID:?run it with: sbatch --array=0-15 scripts/slurm_array.sh}"
: "${NUM_SPLIT:=16}" "${SLURM_ARRAY_TASK_COUNT:=1}"
export NUM_SPLIT
SHARDS=$(seq -s, "$SLURM_ARRAY_TASK_ID" "$SLURM_ARRAY_TASK_COUNT" $((NUM_SPLIT - 1)))
export SHARDS
[ -n "$SHARDS" ] || exit 0 # more tasks than shards
unset GPU_ID GPU_IDS EXECUTOR # Slurm shows a task its own GPU alone, as the first
run_verb train-grad --benchmark "${BENCHMARK:-emoji}" "$@"
