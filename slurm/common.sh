# shellcheck shell=bash
# Read by every job script, in the repository's folder: the environment, and what stands before a command on a node.

DERMVLP_SRUN_OPTIONS=() # of every srun: pyxis
DERMVLP_WRAPPER=()      # before every command: apptainer
# shellcheck disable=SC1091
[ -f slurm/env.sh ] && source slurm/env.sh # modules, environment, data, salt, keys: see slurm/env.sh.example
set -u                                     # not before: modules and conda read variables that are not set

# what a job of one task puts before a command
# shellcheck disable=SC2034
on_node=("${DERMVLP_WRAPPER[@]}")
if [ ${#DERMVLP_SRUN_OPTIONS[@]} -gt 0 ]; then
    on_node=(srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${DERMVLP_SRUN_OPTIONS[@]}" "${on_node[@]}")
fi
