#!/bin/bash
# banking on 4x8, made by tunesmith launch slurm
#SBATCH --job-name=banking
#SBATCH --chdir='/home/me/my project'
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --time=12:00:00
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=48
#SBATCH --mem=400G
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --qos=high

set -eo pipefail
module load cuda
source .venv/bin/activate
set -u
if [[ $SLURM_JOB_NUM_NODES != 4 ]]; then
    echo "this script is for --nodes 4, not $SLURM_JOB_NUM_NODES: generate another" >&2
    exit 2
fi
if ! command -v tunesmith >/dev/null; then
    echo "no tunesmith on $(hostname): activate its environment before sbatch, or generate with --setup" >&2
    exit 3
fi

# machine 0 is the first host of the job, as in srun's numbers of the nodes
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
main=${hosts%%$'\n'*}
if [[ -z $main ]]; then
    echo "scontrol names no host of this job" >&2
    exit 3
fi
port=$((15000 + 2 * (SLURM_JOB_ID % 7500))) # the next one is used too

# On each node. Slurm signals this shell alone, which passes it on. The first bad exit makes srun kill the other nodes
# (137) and the highest code is the job's: so codes are passed above 200, those that can be resumed (5, 6) below those
# that cannot, and who only stopped (4), was stopped or lost a peer leaves the others time to save and to speak first.
# shellcheck disable=SC2016  # expanded on each node: SLURM_NODEID is another on each
on_node='
told=
parent=
stop() { told=yes; kill -TERM "$parent" 2>/dev/null; }
trap stop TERM
tunesmith train "$@" --machine-rank "$SLURM_NODEID" &
parent=$!
[[ -z $told ]] || stop
wait "$parent"
code=$?
while [[ -n $told ]]; do
    told=
    wait "$parent"
    code=$?
done
case $code in
    4 | 5 | 6) sleep 30 ;;
    126 | 127) code=3 ;; # no tunesmith on this node
esac
case $code in
    1 | 2 | 3 | 4) exit $((220 + code)) ;;
    5 | 6) exit $((200 + code)) ;;
esac
exit "$code"
'

code=0
srun --nodes=4 --ntasks-per-node=1 --cpu-bind=none --wait=0 --cpus-per-task=48 --kill-on-bad-exit=1 \
    bash -c "$on_node" on_node recipes/banking.yaml optim.learning_rate=1e-4 'data.cache_dir=/c/Bob'"'"'s runs $(x)' --num-processes 32 --num-machines 4 --restart \
    --main-process-ip "$main" --main-process-port "$port" \
    || code=$?
if ((code == 253)); then code=3; fi # out of memory, says Slurm
if ((code > 200 && code < 230)); then code=$((code % 10)); fi

# interrupted (5; 143: before the first checkpoint), or a node was lost (6): the next start goes on from there
case $code in
    5 | 6 | 143)
        if ((${SLURM_RESTART_COUNT:-0} < 5)); then
            scontrol requeue "$SLURM_JOB_ID" || echo "scontrol did not requeue this job" >&2
        fi
        ;;
esac
exit "$code"
