#!/bin/bash
# banking on 1x8, made by tunesmith launch slurm
#SBATCH --job-name=banking
#SBATCH --chdir=/home/me/project
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -eo pipefail
set -u
if [[ $SLURM_JOB_NUM_NODES != 1 ]]; then
    echo "this script is for --nodes 1, not $SLURM_JOB_NUM_NODES: generate another" >&2
    exit 2
fi
if ! command -v tunesmith >/dev/null; then
    echo "no tunesmith on $(hostname): activate its environment before sbatch, or generate with --setup" >&2
    exit 3
fi

code=0
srun --nodes=1 --ntasks-per-node=1 --cpu-bind=none --wait=0 --kill-on-bad-exit=1 \
    tunesmith train recipes/banking.yaml optim.learning_rate=1e-4 'data.cache_dir=/c/Bob'"'"'s runs $(x)' --num-processes 8 --restart \
    || code=$?
if ((code == 253)); then code=3; fi # out of memory, says Slurm
exit "$code"
