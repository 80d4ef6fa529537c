"""What the loop asks of an engine. Only the modules in this folder know accelerate or torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.module import TrainModule


class Engine(Protocol):
    """One process of a run, together with its peers."""

    name: str
    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    module: nn.Module  # what is called: the wrapped TrainModule
    train_module: TrainModule  # what was handed in
    optimizer: torch.optim.Optimizer

    def prepare(
        self, module: TrainModule, build_optimizer: Callable[[TrainModule], torch.optim.Optimizer]
    ) -> None:
        """Moves, wraps and checks the module, then builds the optimizer on what came out."""
        ...

    def forward(self, batch: Batch, mode: str, normalizers: Tensor | None = None, **options: Any) -> Any:
        """Runs the wrapped module; the batch is moved to the device."""
        ...

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward *and* backward of a micro-step: gradients are reduced over the ranks in the last one."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`. After the last micro-step `.grad` holds the mean over ranks, so losses are
        divided by units / world size."""
        ...

    def gradient_square_sum(self) -> Tensor:
        """Σ g² over all gradients of the global model: 0-dim fp64, the same on every rank."""
        ...

    def step(self, coefficient: Tensor, skip: Tensor) -> None:
        """One optimizer step with gradients × `coefficient`; none at all where `skip` is not zero, decided on the
        device. Gradients are cleared."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on the device."""
        ...

    def gather(self, obj: Any) -> list[Any]:
        """Every rank's picklable value, in the order of ranks, on every rank."""
        ...

    def broadcast(self, obj: Any) -> Any:
        """Rank 0's picklable value."""
        ...

    def barrier(self) -> None: ...

    def wait_for_all(self, name: str) -> None:
        """Waits until every rank has come here, however long it takes: no collective, so no time-out. For work
        that one process of a machine does while the others wait. A name is used once."""
        ...

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state by parameter name, on every rank."""
        ...

    def load_optimizer_state(self, state: dict[str, Any]) -> None: ...

    def facts(self) -> dict[str, Any]:
        """What really engaged, read from the objects after `prepare`."""
        ...

    def close(self) -> None: ...
