"""Distributed data parallel, launched and prepared through accelerate; gradients are meaned over the ranks."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tunesmith.engine.ranks import RankedEngine
from tunesmith.errors import MachineError
from tunesmith.module import TrainModule


# without annotations: DDP refuses those of a hook that are strings, as all of this file's are
def _mean_in_fp32(state, bucket):  # pyright: ignore[reportMissingParameterType]
    """DDP's mean over the ranks, of bf16 gradients: summed in fp32, rounded once."""
    wide = bucket.buffer().float() / dist.get_world_size()
    reduced = dist.all_reduce(wide, async_op=True)
    assert reduced is not None
    return reduced.get_future().then(lambda _: wide.to(bucket.buffer().dtype))


class DDPEngine(RankedEngine):
    """Gradients are meaned over the ranks in a window's last backward."""

    name = "ddp"

    def __init__(self, device_type: str, timeout: float) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        cpu = device_type == "cpu"
        # without an explicit backend accelerate can take every rank for a world of its own
        handler = InitProcessGroupKwargs(backend="gloo" if cpu else None, timeout=timedelta(seconds=timeout))
        self.accelerator: Any = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[handler])
        self._take_places(self.accelerator.device)

    def _wrap(self, module: TrainModule) -> nn.Module:
        wrapped = self.accelerator.prepare_model(module)
        if not isinstance(wrapped, DistributedDataParallel):
            raise MachineError(
                f"asked for ddp, but accelerate prepared a {type(wrapped).__name__}: the gradients would not be "
                "reduced; check the ACCELERATE_* variables and the accelerate config of this machine"
            )
        if any(p.dtype == torch.bfloat16 for p in module.parameters() if p.requires_grad):
            wrapped.register_comm_hook(None, _mean_in_fp32)
        return wrapped

    def train_only(self, names: Collection[str]) -> None:
        super().train_only(names)
        # DDP waits for the gradients of the parameters that required one when it was made, and of no others. The old
        # one's hooks would be called in every backward for as long as anything holds it; accelerate's own way to let go
        # of it collects garbage, which takes a second.
        vars(self).pop("module")._remove_autograd_hooks()
        self.accelerator._models.clear()
        self.module = self._wrap(self.train_module)

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else cast(DistributedDataParallel, self.module).no_sync()

    def close(self) -> None:
        # DDP's reducer holds the process group too. Were it the last to let go, gloo's threads would be joined under
        # the GIL, for which one of them may be waiting to drop the last collective's tensors: a deadlock (pytorch
        # issue 56297; seen about once in a hundred runs). Python's own reference is dropped without the GIL: last.
        vars(self).pop("module", None)
        self.accelerator.free_memory()
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()
