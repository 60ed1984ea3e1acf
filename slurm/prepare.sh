#!/bin/bash
# Submits the five stages of a preparation, each after the one before it: slurm/prepare.sh CONFIG NUM_PARTS [key.path=value ...]
# A part that failed is submitted again by itself: DERMVLP_NUM_PARTS=16 sbatch --array=3 slurm/prepare_array.sbatch CONFIG scan
set -euo pipefail
config=${1:?usage: slurm/prepare.sh CONFIG NUM_PARTS [key.path=value ...]}
num_parts=${2:?number of jobs in an array}
shift 2
after=()
for stage in scan plan captions shards merge; do
    array=()
    case $stage in scan | captions | shards) array=(--array="0-$((num_parts - 1))") ;; esac
    job=$(sbatch --parsable "${array[@]}" "${after[@]}" slurm/prepare_array.sbatch "$config" "$stage" "$@")
    echo "$stage: job ${job%%;*}"
    after=(--dependency="afterok:${job%%;*}" --kill-on-invalid-dep=yes)
done
