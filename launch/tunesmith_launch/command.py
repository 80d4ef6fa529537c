"""From a recipe's arguments and a cluster to the command that starts the ranks. Pure: nothing is run or read."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ACCELERATE_CONFIG = Path(__file__).with_name("accelerate.yaml")

# what a launcher tells its ranks: inherited from a cluster's job, they would make one process look for peers
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")


@dataclass(frozen=True, slots=True)
class Cluster:
    """The processes to start. `num_processes` is the sum over all machines; `accelerators` and `cores` are those of
    this machine, 0 accelerators meaning that the run computes on the CPU; `interface` is the network's, to the other
    machines."""

    num_processes: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None
    accelerators: int = 0
    cores: int = 1
    interface: str | None = None

    @property
    def processes_here(self) -> int:
        return self.num_processes // self.num_machines


@dataclass(frozen=True, slots=True)
class Command:
    """What starts the ranks of this machine: `env` is laid over the caller's environment, from which `unset` is
    removed; `files` are read by the command. `has_agent`: the process started is not a rank but starts them."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    unset: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    has_agent: bool = False

    def environment(self, caller: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in caller.items() if name not in self.unset} | dict(self.env)

    def render(self) -> str:
        """The command as one line for a shell, the content of its files below it as comments."""
        removed = [word for name in self.unset for word in ("-u", name)]
        assigned = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.env.items())]
        prefix = ["env", *removed] if removed else []
        lines = [" ".join([*prefix, *assigned, shlex.join(self.argv)])]
        for file in self.files:
            lines += [
                f"# {file}:",
                *(f"#   {line}" for line in file.read_text(encoding="utf-8").splitlines()),
            ]
        return "\n".join(lines)


def build(
    arguments: Sequence[str],
    cluster: Cluster,
    environ: Mapping[str, str],
    python: str,
    *,
    module: str = "tunesmith",
) -> Command:
    """The command for this machine's ranks, each of which is `python -m MODULE` with `arguments`; `environ` is the
    caller's environment."""
    rank = ("-m", module, *arguments)
    env: dict[str, str] = {}
    if cluster.accelerators == 0 and "OMP_WAIT_POLICY" not in environ:
        # threads that spin at barriers run at a fifth of the speed where anything else wants the cores
        env["OMP_WAIT_POLICY"] = "passive"
    if cluster.num_processes == 1:
        return Command((python, *rank), env, unset=tuple(name for name in _RANK_VARIABLES if name in environ))
    if cluster.accelerators == 0:
        # accelerate's own --cpu starts one process, whatever --num_processes says; --multi_gpu with this variable
        # starts them all, on gloo
        env["ACCELERATE_USE_CPU"] = "true"
    if "OMP_NUM_THREADS" not in environ:
        env["OMP_NUM_THREADS"] = str(max(1, cluster.cores // cluster.processes_here))
    if "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in environ:
        env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "300"  # seconds for the ranks' last save; 30 by default
    if cluster.interface is not None and "GLOO_SOCKET_IFNAME" not in environ:
        env["GLOO_SOCKET_IFNAME"] = cluster.interface
    if cluster.interface is not None and "NCCL_SOCKET_IFNAME" not in environ:
        env["NCCL_SOCKET_IFNAME"] = f"={cluster.interface}"  # without the sign, bond0 means bond0.100 too
    flags = {
        "--config_file": str(ACCELERATE_CONFIG),
        "--num_processes": str(cluster.num_processes),
        "--num_machines": str(cluster.num_machines),
        "--machine_rank": str(cluster.machine_rank),
        "--main_process_port": str(cluster.main_process_port or 0),  # 0: a free one
        "--rdzv_backend": "static",
        "--mixed_precision": "no",  # the engine's business
        "--dynamo_backend": "no",
    }
    if cluster.num_machines > 1:
        assert cluster.main_process_ip is not None
        flags["--main_process_ip"] = cluster.main_process_ip
    accelerate = [python, "-m", "accelerate.commands.launch", "--multi_gpu"]
    if cluster.num_machines > 1:
        accelerate.append("--same_network")  # the address given is that of the ranks' store itself
    words = [word for pair in flags.items() for word in pair]
    return Command((*accelerate, *words, *rank), env, files=(ACCELERATE_CONFIG,), has_agent=True)
