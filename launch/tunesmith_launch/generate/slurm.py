"""A batch script for Slurm: one `tunesmith train` per node, which starts and watches the ranks of its node.

What is relied on (Slurm's manuals of sbatch, srun and scontrol): srun ends with the highest exit code of its tasks,
128 + signal for one that was killed, 253 for out of memory; `--kill-on-bad-exit` kills all other tasks as soon as one
ends with another code than 0; `--signal=TERM@S` reaches the tasks of srun S seconds before the end of the time, and of
each task only the first process; SLURM_RESTART_COUNT counts the requeues.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tunesmith_launch.generate.job import Job, printable


@dataclass(frozen=True, slots=True)
class Options:
    """`chdir` is the folder in which the script was asked for: the recipe's path and its output_dir are relative to
    it. `cpus_per_node` None means the whole node. `grace`: seconds for the last save. `requeues`: how often a job that
    was interrupted, or lost a node, is put into the queue again. `setup`: lines of shell to run first. `sbatch`: more
    options of sbatch."""

    chdir: str
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    cpus_per_node: int | None = None
    memory_per_node: str | None = None
    grace: int = 300
    requeues: int = 0
    setup: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()


_BEGIN = """set -u
if [[ $SLURM_JOB_NUM_NODES != {nodes} ]]; then
    echo "this script is for --nodes {nodes}, not $SLURM_JOB_NUM_NODES: generate another" >&2
    exit 2
fi"""

_INSTALLED = """if ! command -v tunesmith >/dev/null; then
    echo "no tunesmith on $(hostname): activate its environment before sbatch, or generate with --setup" >&2
    exit 3
fi"""

_ADDRESS = r"""
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
"""

_OUT_OF_MEMORY = "if ((code == 253)); then code=3; fi # out of memory, says Slurm"

_DECODE = "if ((code > 200 && code < 230)); then code=$((code % 10)); fi"

_REQUEUE = """
# interrupted (5; 143: before the first checkpoint), or a node was lost (6): the next start goes on from there
case $code in
    5 | 6 | 143)
        if ((${{SLURM_RESTART_COUNT:-0}} < {requeues})); then
            scontrol requeue "$SLURM_JOB_ID" || echo "scontrol did not requeue this job" >&2
        fi
        ;;
esac"""


def script(job: Job, options: Options) -> str:
    """The batch script. The job ends with the exit code of the run (docs/run-folder.md). Raises UserError."""
    lines = ["#!/bin/bash", f"# {job.about('slurm')}"]
    lines += [f"#SBATCH {directive}" for directive in _directives(job, options)]
    # what activates an environment often reads variables that are not set: `set -u` comes after it
    lines += ["", "set -eo pipefail", *(printable("--setup", line) for line in options.setup)]
    lines += [_BEGIN.format(nodes=job.nodes), _INSTALLED]
    if job.gpus_per_node == 0:
        lines += ["export TUNESMITH_DEVICE=cpu # also where a node has a GPU"]
    lines += [_ADDRESS if job.nodes > 1 else "", "code=0", _srun(job, options)]
    lines += [_OUT_OF_MEMORY, *([_DECODE] if job.nodes > 1 else [])]
    if options.requeues:
        lines += [_REQUEUE.format(requeues=options.requeues)]
    return "\n".join([*lines, 'exit "$code"']) + "\n"


def _directives(job: Job, options: Options) -> Iterator[str]:
    def option(name: str, value: str) -> str:
        return f"--{name}={shlex.quote(printable(f'--{name}', value))}"

    yield option("job-name", job.run_name)
    yield option("chdir", options.chdir)
    for name, value in (
        ("partition", options.partition),
        ("account", options.account),
        ("time", options.time),
    ):
        if value is not None:
            yield option(name, value)
    yield f"--nodes={job.nodes}"
    yield "--ntasks-per-node=1"
    if job.gpus_per_node:
        yield f"--gpus-per-node={job.gpus_per_node}"
    if options.cpus_per_node is None:
        yield "--exclusive"  # one task gets one core otherwise
    else:
        yield f"--cpus-per-task={options.cpus_per_node}"
    if options.memory_per_node is not None:
        yield option("mem", options.memory_per_node)
    elif options.cpus_per_node is None:
        yield "--mem=0"  # all of the node's
    yield f"--signal=TERM@{options.grace}"
    yield "--requeue"
    yield "--open-mode=append"
    for text in options.sbatch:
        yield printable("--sbatch", text)


def _srun(job: Job, options: Options) -> str:
    words = [f"--nodes={job.nodes}", "--ntasks-per-node=1", "--cpu-bind=none", "--wait=0"]
    if options.cpus_per_node is not None:
        words += [f"--cpus-per-task={options.cpus_per_node}"]  # srun does not take it from sbatch
    words += ["--kill-on-bad-exit=1"]
    lines = [f"srun {' '.join(words)}"]
    if job.nodes == 1:
        lines += [f"tunesmith train {shlex.join(job.train_arguments)}"]
    else:
        lines += [f'bash -c "$on_node" on_node {shlex.join(job.train_arguments)}']
        lines += ['--main-process-ip "$main" --main-process-port "$port"']
    return " \\\n    ".join([*lines, "|| code=$?"])
