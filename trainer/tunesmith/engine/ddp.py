"""Distributed data parallel, launched and prepared through accelerate; gradients are meaned over the ranks."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tunesmith.engine.single import SingleEngine
from tunesmith.errors import MachineError
from tunesmith.module import TrainModule

_POLL_SECONDS = 0.2


class DDPEngine(SingleEngine):
    """`accelerate launch` or `torchrun` has set the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, …)."""

    name = "ddp"

    def __init__(self, device_type: str, timeout: float) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        launched = int(os.environ["WORLD_SIZE"])
        cpu = device_type == "cpu"
        # without an explicit backend accelerate can take every rank for a world of its own
        handler = InitProcessGroupKwargs(backend="gloo" if cpu else None, timeout=timedelta(seconds=timeout))
        self.accelerator: Any = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[handler])
        super().__init__(self.accelerator.device)
        self.rank = self.accelerator.process_index
        self.local_rank = self.accelerator.local_process_index
        self.world_size = self.accelerator.num_processes
        if self.world_size != launched:
            raise MachineError(
                f"{launched} processes were launched, but accelerate found a world of {self.world_size}: "
                "check the ACCELERATE_* variables and the accelerate config of this machine"
            )

    def _wrap(self, module: TrainModule) -> nn.Module:
        wrapped = self.accelerator.prepare_model(module)
        if not isinstance(wrapped, DistributedDataParallel):
            raise MachineError(
                f"asked for ddp, but accelerate prepared a {type(wrapped).__name__}: the gradients would not be "
                "reduced; check the ACCELERATE_* variables and the accelerate config of this machine"
            )
        return wrapped

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else cast(DistributedDataParallel, self.module).no_sync()

    def sum(self, values: Tensor) -> Tensor:
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

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
        wrapped = cast(DistributedDataParallel, self.module)
        devices = self.gather(str(self.device))
        return {
            "engine": self.name,
            "wrapped_by": type(wrapped).__name__,
            "backend": dist.get_backend(),
            "world_size": self.world_size,
            "device": str(self.device),
            "devices": devices,
        }

    def close(self) -> None:
        # DDP's reducer holds the process group too. Were it the last to let go, gloo's threads would be joined under
        # the GIL, for which one of them may be waiting to drop the last collective's tensors: a deadlock (pytorch
        # issue 56297; seen about once in a hundred runs). Python's own reference is dropped without the GIL: last.
        vars(self).pop("module", None)
        self.accelerator.free_memory()
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()
