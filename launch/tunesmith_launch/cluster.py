"""The options of a launch, checked against the recipe and this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import UserError
from tunesmith.recipe.load import Loaded
from tunesmith_launch.command import Cluster

DEFAULT_PORT = 29500

# the device files of NVIDIA (also under WSL), AMD, Intel, Habana and Ascend accelerators
_DEVICE_FILES = ("nvidia[0-9]*", "dxg", "kfd", "dri/renderD*", "accel/accel*", "davinci[0-9]*")


@dataclass(frozen=True, slots=True)
class Options:
    """As typed; None where it was not."""

    num_processes: int | None = None
    num_machines: int = 1
    machine_rank: int | None = None
    main_process_ip: str | None = None
    main_process_port: int | None = None


def resolve(options: Options, loaded: Loaded, environ: Mapping[str, str]) -> Cluster:
    """The cluster that the options mean: by default the visible accelerators of each machine, or one process on a
    CPU. Raises UserError where the options, the recipe and the machine disagree."""
    _refuse_inside_a_launcher(environ)
    _check_machines(options)
    accelerators = count_accelerators(environ)
    processes = options.num_processes
    if processes is None:
        here = 1 if loaded.recipe.parallel.strategy == "single" else max(1, accelerators)
        processes = here * options.num_machines
    if processes % options.num_machines:
        raise UserError(
            f"--num-processes {processes} is the sum over all machines: it must be a multiple of "
            f"--num-machines {options.num_machines}"
        )
    check_strategy(loaded, processes, "--num-processes")
    here = processes // options.num_machines
    if 0 < accelerators < here:
        raise UserError(
            f"--num-processes: {here} processes on this machine, which shows {accelerators} accelerator"
            f"{'s' if accelerators > 1 else ''} (see CUDA_VISIBLE_DEVICES; TUNESMITH_DEVICE=cpu runs on the CPU)"
        )
    several = options.num_machines > 1
    return Cluster(
        num_processes=processes,
        num_machines=options.num_machines,
        machine_rank=options.machine_rank or 0,
        main_process_ip=options.main_process_ip,
        main_process_port=options.main_process_port or (DEFAULT_PORT if several else None),
        accelerators=accelerators,
        cores=usable_cores(),
    )


def check_strategy(loaded: Loaded, processes: int, option: str) -> None:
    """Raises UserError where the recipe's strategy does not go with so many processes, which `option` asks for."""
    strategy = loaded.recipe.parallel.strategy
    place = loaded.place("parallel.strategy")
    if strategy == "single" and processes > 1:
        raise UserError(
            f"{place}: parallel.strategy: single runs one process, not {processes}; use auto, or ask for one by "
            f"{option}"
        )
    if strategy == "ddp" and processes == 1:
        raise UserError(
            f"{place}: parallel.strategy: {strategy} needs two processes or more: ask for them by {option}, or use auto"
        )


def _refuse_inside_a_launcher(environ: Mapping[str, str]) -> None:
    if "LOCAL_RANK" in environ:
        raise UserError(
            "LOCAL_RANK is set: another launcher has started this process, and tunesmith train would start a whole "
            "run in each; under torchrun or accelerate launch use `-m tunesmith RECIPE`"
        )


def _check_machines(options: Options) -> None:
    if options.num_machines == 1:
        if options.main_process_ip is not None or options.machine_rank:
            raise UserError("--main-process-ip and --machine-rank have no effect without --num-machines")
        return
    if options.main_process_ip is None or options.machine_rank is None:
        raise UserError(
            f"--num-machines {options.num_machines} needs --main-process-ip (of machine 0, the same everywhere) and "
            "--machine-rank (0 to N-1, another on each machine)"
        )
    if options.machine_rank >= options.num_machines:
        raise UserError(
            f"--machine-rank {options.machine_rank}: with --num-machines {options.num_machines} the ranks are 0 to "
            f"{options.num_machines - 1}"
        )


def count_accelerators(environ: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """The accelerators that the run's processes will see. torch is imported only where there may be one."""
    if environ.get("TUNESMITH_DEVICE") == "cpu":
        return 0
    if sys.platform == "linux":
        files = [file for pattern in _DEVICE_FILES for file in devices.glob(pattern)]
        if not files:
            return 0
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def usable_cores() -> int:
    """The cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
