"""The commands of `accelerate launch` and `torchrun`, for those who start the ranks themselves. Every strategy is
launched by the same command: the engine sets up DeepSpeed or FSDP2 inside each rank, from the recipe, so the config
has no section for either, and accelerate's DeepSpeed launchers, which write the environment with its keys into
`.deepspeed_env`, are never used."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from tunesmith.errors import UserError
from tunesmith_launch.generate.job import Job, printable

_INTERFACE = (
    "# Only `tunesmith train` finds the network interface itself: export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME\n"
    "# on each machine where its host name does not lead to the right one. Exit codes become 1: see exit.json.\n"
)


@dataclass(frozen=True, slots=True)
class Address:
    """Of machine 0, as the other machines reach it; `host` None on one machine."""

    host: str | None
    port: int

    def check(self, job: Job) -> None:
        """Raises UserError where it does not go with the number of machines."""
        if job.nodes > 1 and self.host is None:
            raise UserError(f"--nodes {job.nodes} needs --main-process-ip, the address of the first of them")
        if job.nodes == 1 and self.host is not None:
            raise UserError("--main-process-ip has no effect with one node")
        if self.host is not None:
            printable("--main-process-ip", self.host)


def accelerate_config(job: Job, address: Address) -> str:
    """The config of all machines: the number of each is left to the flag."""
    address.check(job)
    several = job.processes > 1
    lines = [
        f"# {job.about('accelerate')}",
        "compute_environment: LOCAL_MACHINE",
        # also on CPUs: MULTI_CPU would look for MPI, and starts one process without it
        f"distributed_type: {'MULTI_GPU' if several else repr('NO')}",
        "mixed_precision: 'no' # the recipe's training.precision decides",
        f"num_machines: {job.nodes}",
        f"num_processes: {job.processes}",
    ]
    if job.nodes > 1:
        assert address.host is not None
        lines += [f"main_process_ip: {_scalar(address.host)}"]
    if several:
        lines += [f"main_process_port: {address.port}", "rdzv_backend: static"]
    return "\n".join([*lines, "use_cpu: false", "debug: false"]) + "\n"


def _scalar(text: str) -> str:
    """In YAML's single quotes."""
    doubled = text.replace("'", "''")
    return f"'{doubled}'"


def accelerate_lines(job: Job, config: str) -> str:
    """The command of each machine."""
    launch = ["accelerate", "launch", "--config_file", config]
    if job.nodes > 1:
        launch += [
            "--same_network"
        ]  # of which a config is not asked: the port is that of the ranks' own store
    return _lines(job, launch, "--machine_rank")


def torchrun_lines(job: Job, address: Address) -> str:
    """The command of each machine; on several a static rendezvous, for their number is fixed."""
    address.check(job)
    if job.nodes == 1:
        return _lines(job, ["torchrun", "--standalone", f"--nproc-per-node={job.processes}"], "--node-rank")
    assert address.host is not None
    launch = [
        "torchrun",
        f"--nnodes={job.nodes}",
        f"--nproc-per-node={job.processes // job.nodes}",
        f"--master-addr={address.host}",
        f"--master-port={address.port}",
    ]
    return _lines(job, launch, "--node-rank")


def _lines(job: Job, launch: list[str], rank_flag: str) -> str:
    cpu = "ACCELERATE_USE_CPU=true TUNESMITH_DEVICE=cpu " if job.gpus_per_node == 0 else ""
    lines: list[str] = []
    for machine in range(job.nodes):
        number = [f"{rank_flag}={machine}"] if job.nodes > 1 else []
        if job.nodes > 1:
            lines.append(f"# machine {machine}")
        lines.append(cpu + shlex.join([*launch, *number, "-m", "tunesmith", *job.rank_arguments]))
    return (_INTERFACE if job.nodes > 1 else "") + "\n".join(lines) + "\n"
