"""What is to be trained, as far as memory and time can tell: the planner's own input, which neither an engine nor a
tokenizer nor weights are needed for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from tunesmith.planning.beside import PLAIN, Beside
from tunesmith.planning.layers import Stack
from tunesmith.planning.optimizers import state_bytes
from tunesmith.planning.tasks import Shape, Task
from tunesmith.recipe.kernels import Kernels
from tunesmith.recipe.optim import Optim


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter. `stored`: bytes of the tensor as the whole model holds it (NF4: the packed weight with its
    scales); `place`: its number in the model."""

    name: str
    shape: tuple[int, ...]
    trainable: bool
    stored: int
    place: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def shard(self, ranks: int) -> int:
        """Elements of one rank's slice, cut and padded along the first dimension as DTensor does."""
        if not self.shape:
            return 1
        return -(-self.shape[0] // ranks) * prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that are gathered and let go of together: a layer, or what no layer holds (the root)."""

    name: str
    parameters: tuple[Parameter, ...]

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def trainable(self) -> int:
        return sum(p.numel for p in self.parameters if p.trainable)

    @property
    def stored(self) -> int:
        return sum(p.stored for p in self.parameters)

    def shard(self, ranks: int) -> int:
        """Elements that one of `ranks` holds, trained or not."""
        return sum(p.shard(ranks) for p in self.parameters)

    def trained_shard(self, ranks: int) -> int:
        return sum(p.shard(ranks) for p in self.parameters if p.trainable)


@dataclass(frozen=True, slots=True)
class Workload:
    """One training run apart from how it is spread: `layers[s][i]` is layer i of stack s. `shape.rows` is the
    largest micro-batch wanted; `rows_per_step` the global batch."""

    name: str
    task: Task
    shape: Shape
    precision: str  # fp32 | bf16 | fp16
    optim: Optim
    kernels: Kernels
    rows_per_step: int
    root: Unit
    layers: tuple[tuple[Unit, ...], ...]
    stacks: tuple[Stack, ...]
    buffers: int  # bytes of the model's buffers
    can_checkpoint: bool
    vocabulary: int
    beside: Beside = PLAIN

    @property
    def units(self) -> list[Unit]:
        return [self.root, *(unit for stack in self.layers for unit in stack)]

    @property
    def numel(self) -> int:
        return sum(unit.numel for unit in self.units)

    @property
    def trainable(self) -> int:
        return sum(unit.trainable for unit in self.units)

    @property
    def stored(self) -> int:
        return sum(unit.stored for unit in self.units)

    def state_bytes(self, shapes: Sequence[tuple[int, ...]]) -> float:
        """What the optimizer and strategies keep for trained tensors of these shapes."""
        kept = self.beside.per_weight * sum(prod(shape) for shape in shapes)
        return state_bytes(self.optim, shapes) + kept


def units_of(model: nn.Module, stacks: list[Stack]) -> tuple[Unit, tuple[tuple[Unit, ...], ...]]:
    """(the root, the layers of each stack) of a whole model. A tied parameter counts where it comes first."""
    seen: set[int] = set()
    places = {id(parameter): place for place, parameter in enumerate(model.parameters())}

    def unit(name: str, part: nn.Module) -> Unit:
        found: list[Parameter] = []
        for leaf, parameter in part.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                shape = tuple(getattr(parameter, "whole_shape", parameter.shape))
                stored = getattr(parameter, "stored_bytes", parameter.numel() * parameter.element_size())
                path = f"{name}.{leaf}".lstrip(".")
                found.append(Parameter(path, shape, parameter.requires_grad, stored, places[id(parameter)]))
        return Unit(name, tuple(found))

    layers = tuple(
        tuple(unit(f"{stack.name}.{i}", model.get_submodule(f"{stack.name}.{i}")) for i in range(stack.depth))
        for stack in stacks
    )
    return unit("", model), layers
