#!/bin/bash
# Submits the whole way from the repository's folder, each job after the one before it: the five stages of a
# preparation, the training, the evaluation of its last checkpoint on each split named.
#
#   slurm/chain.sh DATA_CONFIG NUM_PARTS TRAIN_CONFIG RUN_DIR SPLIT [SPLIT ...]
#
# DERMVLP_TRAIN_OPTIONS holds sbatch's options for the training ("--nodes=4 --gpus-per-node=8 --time=2-0"),
# DERMVLP_SERVE_LLM=1 lets the stage captions start its own language model. A job that fails cancels those after it; a
# training that is requeued keeps them waiting. The same command again goes on from what is there.
set -euo pipefail
usage="usage: slurm/chain.sh DATA_CONFIG NUM_PARTS TRAIN_CONFIG RUN_DIR SPLIT [SPLIT ...]"
data_config=${1:?$usage} num_parts=${2:?$usage} train_config=${3:?$usage} run_dir=${4:?$usage} _=${5:?$usage}
shift 4

stages=$(slurm/prepare.sh "$data_config" "$num_parts")
echo "$stages"
read -ra train_options <<<"${DERMVLP_TRAIN_OPTIONS:-}"
train=$(sbatch --parsable --dependency="afterok:${stages##* }" --kill-on-invalid-dep=yes "${train_options[@]}" \
    slurm/train_multinode.sbatch "$train_config" "run_dir=$run_dir")
train=${train%%;*}
echo "train: job $train"

list=dermvlp-evaluate-after-$train.tsv
for split in "$@"; do
    name=${split#/}
    printf '%s\t%s\t%s\n' "$run_dir" "$split" "$run_dir/evaluations/${name//\//-}"
done >"$list"
evaluate=$(sbatch --parsable --dependency="afterok:$train" --kill-on-invalid-dep=yes --array="0-$(($# - 1))" \
    slurm/evaluate_array.sbatch "$list")
echo "evaluate: job ${evaluate%%;*}"
