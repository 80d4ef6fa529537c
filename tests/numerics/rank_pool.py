"""Two ranks that stay alive: starting a distributed job costs more than ten seconds, a tiny run less than one."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import random
import socket
import sys
import traceback
from copy import copy
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from tunesmith.recipe import Recipe
from tunesmith.run import Resume

SECONDS = 120.0  # for one run
_RUNS = 8  # after so many, what libraries keep of them is dropped


@dataclass
class Ranks:
    """`run` trains a recipe on all ranks and raises what went wrong on any of them."""

    world_size: int
    processes: list[BaseProcess]
    pipes: list[Connection]

    @staticmethod
    def start(world_size: int) -> Ranks:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(world_size)]
        processes = [
            context.Process(target=_serve, args=(rank, world_size, pipe), daemon=True)
            for rank, (_, pipe) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        return Ranks(world_size, list(processes), [own for own, _ in pipes])

    def run(self, recipe: Recipe, base: Path, how: Resume | None = None) -> None:
        assert all(process.is_alive() for process in self.processes), "the ranks died in an earlier test"
        port = _free_port()
        for pipe in self.pipes:
            pipe.send((recipe, base, port, how or Resume()))
        waiting = list(self.pipes)
        failures: list[str] = []
        try:
            while waiting:
                ready = wait(waiting, SECONDS)
                assert ready, "\n".join(["the ranks hang", *failures])
                failures += [pipe.recv() for pipe in waiting if pipe in ready]
                waiting = [pipe for pipe in waiting if pipe not in ready]
        except (AssertionError, EOFError):
            self.stop()  # what they send later would be taken for the next run's
            raise
        if any(failures):
            raise RuntimeError("\n".join(failures))

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


class Pools:
    """Pools of ranks by their number, started when they are first asked for."""

    def __init__(self) -> None:
        self._pools: dict[int, Ranks] = {}

    def __getitem__(self, world_size: int) -> Ranks:
        if world_size not in self._pools:
            self._pools[world_size] = Ranks.start(world_size)
        return self._pools[world_size]

    def stop(self) -> None:
        for pool in self._pools.values():
            pool.stop()


class LivingPools(Pools):
    """As Pools; ranks that died of one cell are followed by new ones."""

    def __getitem__(self, world_size: int) -> Ranks:
        ranks = super().__getitem__(world_size)
        if all(process.is_alive() for process in ranks.processes):
            return ranks
        del self._pools[world_size]
        return super().__getitem__(world_size)


def _free_port() -> int:
    """Below the ports that the system hands out by itself: a rank that calls before rank 0 listens could else be
    given the very port that it calls, and talk to itself. Not drawn from `random`: runs in the test's own process seed
    it, so that two workers of pytest would draw the same ports, and each worker has a range of its own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
    dice = random.SystemRandom()
    while True:
        port = 30_000 + 690 * worker + dice.randrange(690)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _deepspeed_globals() -> list[tuple[ModuleType, dict[str, Any]]]:
    """DeepSpeed's modules that keep process groups, with the values of a process that has made none."""
    import deepspeed.comm.comm
    import deepspeed.comm.torch
    import deepspeed.utils.groups

    modules = [deepspeed.comm.comm, deepspeed.comm.torch, deepspeed.utils.groups]
    return [
        (
            module,
            {k: copy(v) for k, v in vars(module).items() if v is None or isinstance(v, dict | bool | int)},
        )
        for module in modules
    ]


def _let_go_of_groups() -> None:
    """What torch and DeepSpeed keep for the life of a process keeps the process groups of runs that are over, each
    with a thread of gloo's that wakes up 100 times a second: 85 of them were seen in one rank."""
    import torch
    from deepspeed.runtime.zero import parameter_offload
    from torch.distributed.tensor import _redistribute

    parameter_offload.FWD_MODULE_STACK.clear()
    _redistribute.clear_redistribute_planner_cache()
    torch._C._clear_DTensor_sharding_propagator_cache()  # pyright: ignore[reportPrivateUsage]
    for kept in gc.get_objects():
        if isinstance(kept, functools._lru_cache_wrapper):  # pyright: ignore[reportPrivateUsage]
            module: str = getattr(kept, "__module__", None) or ""
            if module.startswith(("deepspeed.", "torch.distributed.")):
                kept.cache_clear()
    gc.collect()


def _serve(rank: int, world_size: int, pipe: Connection) -> None:
    """What torchrun sets, then run after run, each with a process group of its own."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "ACCELERATE_USE_CPU": "true",
        "TUNESMITH_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    from accelerate.state import AcceleratorState

    from tunesmith.run import run

    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    environment, fresh = dict(os.environ), _deepspeed_globals()
    runs = 0
    while True:
        try:
            recipe, base, port, how = pipe.recv()
        except EOFError:
            return
        os.environ["MASTER_PORT"] = str(port)
        try:
            run(recipe, base, how)
            pipe.send("")
        except BaseException:  # noqa: BLE001 — the test reports it
            pipe.send(f"rank {rank}:\n{traceback.format_exc()}")
        # accelerate keeps its state, and what it told DeepSpeed, for the life of a process, which elsewhere is one run
        os.environ.clear()
        os.environ |= environment
        for module, values in fresh:
            vars(module).update(values)
        AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]
        runs += 1
        if runs % _RUNS == 0:
            _let_go_of_groups()
