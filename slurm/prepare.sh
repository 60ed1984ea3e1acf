#!/bin/bash
# Submits the five stages of a preparation from the repository's folder, each stage after the one before it:
#
#   slurm/prepare.sh CONFIG NUM_PARTS [key.path=value ...]
#
# With DERMVLP_SERVE_LLM=1 each part of the stage captions starts a language model beside itself (caption_array.sbatch).
#
# A stage that fails or runs out of time cancels those after it. The same command again repeats only what is missing. To
# repeat one failed part first: DERMVLP_NUM_PARTS=16 sbatch --array=3 slurm/prepare_array.sbatch CONFIG scan
set -euo pipefail
config=${1:?usage: slurm/prepare.sh CONFIG NUM_PARTS [key.path=value ...]}
num_parts=${2:?number of jobs in an array}
shift 2
unset DERMVLP_NUM_PARTS # of a part submitted by itself: here the array says how many there are
after=()
for stage in scan plan captions shards merge; do
    kind=(--output=%x-%j.out)
    case $stage in scan | captions | shards) kind=(--array="0-$((num_parts - 1))") ;; esac
    script=(slurm/prepare_array.sbatch "$config" "$stage")
    if [ "$stage" = captions ] && [ "${DERMVLP_SERVE_LLM:-0}" = 1 ]; then
        script=(slurm/caption_array.sbatch "$config")
    fi
    job=$(sbatch --parsable --job-name="dermvlp-$stage" "${kind[@]}" "${after[@]}" "${script[@]}" "$@")
    echo "$stage: job ${job%%;*}"
    after=(--dependency="afterok:${job%%;*}" --kill-on-invalid-dep=yes)
done
