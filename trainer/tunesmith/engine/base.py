"""What the loop asks of an engine. Only the modules in this folder know accelerate or torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.checkpoint.pieces import Saved, State
from tunesmith.engine.shards import Shard
from tunesmith.module import TrainModule
from tunesmith.optim import Spec

Fill = Callable[[torch.device], None]
"""Gives weights to a model that was built without; does nothing to one that has them."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a forward and backward showed. `unused`: trainable parameters that the loss does not depend on. `finite`:
    whether the gradient was; where `reduced`, that of all ranks together, else this rank's own."""

    loss: Tensor
    unused: list[str]
    finite: bool
    reduced: bool


class Engine(Protocol):
    """One process of a run, together with its peers."""

    name: str
    rank: int
    local_rank: int
    world_size: int
    data_rank: int  # ranks that compute one batch together (its layers, or its sequences) share it
    data_size: int  # over how many the rows are dealt
    mean_size: int  # over how many gradients are meaned
    draw_rank: int  # ranks that compute the same numbers draw the same dropout
    builds_empty: bool  # the model is built without weights, and filled once it is sharded
    sharded: bool  # no rank holds the whole model
    shards_optimizer: bool  # … or the whole optimizer state
    rebuilt: frozenset[
        str
    ]  # of the model's state: what the model's files give again, and checkpoints leave out
    device: torch.device
    module: nn.Module  # what is called: the wrapped TrainModule
    train_module: TrainModule  # what was handed in
    optimizer: torch.optim.Optimizer

    def prepare(
        self,
        module: TrainModule,
        fill: Fill,
        spec: Spec,
    ) -> None:
        """Moves, wraps and checks the module and builds the optimizer on what came out. `fill` gives weights to a
        module that was built without. Raises MachineError where anything else came out than the engine's name
        says."""
        ...

    def part(self, batch: Batch) -> Batch:
        """This rank's part of a batch: all of it, unless several ranks share a sequence."""
        ...

    def rehearse(self, batch: Batch, normalizers: Tensor) -> Rehearsal:
        """One forward and backward whose gradients are dropped; no weight changes. Called by all ranks."""
        ...

    def leave_unused(self, names: Sequence[str]) -> None:
        """Tells of the trainable parameters that the loss does not depend on: on every engine their gradient is
        zero, so that a weight decay shrinks them everywhere alike."""
        ...

    def train_only(self, names: Collection[str]) -> None:
        """From now on only these of the parameters that the optimizer was built for are trained; the others get no
        gradient, no update and no optimizer state, as if they were frozen. The parameters of a group of
        `optim.parameter_groups` go together. Called by all ranks alike, between steps."""
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

    def shards(self) -> list[Shard]:
        """This rank's part of each parameter that the optimizer was built for, in its order, those that are not
        trained now included. A rank may hold nothing of a parameter. `engine.shards` saves and loads state that is as
        large."""
        ...

    def wrote(self) -> None:
        """After the values of shards were written, between a backward and a forward: what forwards compute with
        follows. Called by all ranks."""
        ...

    def discard(self) -> None:
        """Drops the gradients of a whole window; no weight, and no state that an update would make, changes. Called
        by all ranks, after its last backward."""
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

    def weights(self) -> State:
        """The model's state by name, but what is `rebuilt`: whole tensors, or where the engine shards, this rank's
        pieces."""
        ...

    def load_weights(self, saved: Saved) -> None:
        """In place; whatever the number of ranks and the engine that saved. Shards' values follow."""
        ...

    def whole_weights(self) -> dict[str, Tensor]:
        """The whole model's state, but what is `rebuilt`, on the CPU of rank 0; empty elsewhere. Called by all
        ranks."""
        ...

    def optimizer_state(self) -> dict[str, State]:
        """The optimizer's state by parameter name (as in the whole module) and key: tensors, pieces, numbers."""
        ...

    def load_optimizer_state(self, saved: Saved) -> None: ...

    def facts(self) -> dict[str, Any]:
        """What really engaged, read from the objects after `prepare`."""
        ...

    def close(self) -> None: ...
