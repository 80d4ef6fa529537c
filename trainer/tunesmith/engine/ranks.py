"""What the engines of several ranks share: agreement over the process group, and the checks of what came out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from tunesmith.engine.single import SingleEngine
from tunesmith.errors import MachineError

_POLL_SECONDS = 0.2


class RankedEngine(SingleEngine):
    """A launcher has set the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, …), and the engine has made the
    default process group of it."""

    def _take_places(self, device: torch.device) -> None:
        """This rank's numbers, from the process group. Raises MachineError where it is not the world launched."""
        super().__init__(device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.data_rank, self.data_size = self.rank, self.world_size
        self.mean_size, self.draw_rank = self.world_size, self.rank
        launched = int(os.environ["WORLD_SIZE"])
        if self.world_size != launched:
            raise MachineError(
                f"{launched} processes were launched, but a world of {self.world_size} was found: check the "
                "ACCELERATE_* variables and the accelerate config of this machine"
            )

    def _agreed(self, check: Callable[[], str | None]) -> None:
        """Raises MachineError on all ranks where `check` finds something on one of them: nothing trains on an engine
        that did not engage."""
        found = self.gather(check())
        told = [f"rank {rank}: {what}" for rank, what in enumerate(found) if what]
        if told:
            raise MachineError(f"parallel.strategy: {self.name} did not engage: {told[0]}")

    def _bound_collectives(self, seconds: float) -> None:
        """`parallel.timeout` for every process group there is: those that fully_shard's mesh and DeepSpeed make for
        themselves have torch's 10 or 30 minutes. Called when the module is wrapped."""
        torch_distributed = cast(Any, dist.distributed_c10d)
        for group in list(torch_distributed._world.pg_map):
            torch_distributed._set_pg_timeout(timedelta(seconds=seconds), group)

    def _timeouts(self) -> list[float]:
        """Of the process groups, in seconds, as their backends have them; each once."""
        groups = list(cast(Any, dist.distributed_c10d)._world.pg_map)
        backends = [group._get_backend(torch.device(self.device.type)) for group in groups]
        return sorted({backend.options._timeout.total_seconds() for backend in backends})

    def sum(self, values: Tensor) -> Tensor:
        values = values.to(self.device)
        dist.all_reduce(values)
        # ranks that compute the layers of one batch together would count it several times
        copies = self.world_size // self.mean_size
        return values if copies == 1 else values / copies

    def gather(self, obj: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, obj)
        return values

    def broadcast(self, obj: Any) -> Any:
        values = [obj]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        dist.barrier()

    def wait_for_all(self, name: str) -> None:
        store = cast(Any, dist.distributed_c10d)._get_default_store()
        store.set(f"tunesmith/{name}/{self.rank}", "here")
        keys = [f"tunesmith/{name}/{rank}" for rank in range(self.world_size)]
        while not store.check(keys):
            time.sleep(_POLL_SECONDS)

    def facts(self) -> dict[str, Any]:
        places = self.gather((str(self.device), self.data_rank))
        assert {place for _, place in places} == set(range(self.data_size)), "ranks share their rows"
        return {
            "engine": self.name,
            "wrapped_by": type(self.module).__name__,
            "backend": dist.get_backend(),
            "collective_timeouts": self._timeouts(),
            "world_size": self.world_size,
            "data_parallel_size": self.data_size,
            "device": str(self.device),
            "devices": [device for device, _ in places],
        }
