"""The part of each trained parameter that a rank updates, whatever the engine: what penalties, perturbations and
averages work on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tunesmith.checkpoint.pieces import Piece, Saved, State


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's elements of one parameter, as they stand now: to be asked for anew after a step, since what an
    optimizer updates may be made in its first one, and gradients come and go.

    name: as in `train_module.named_parameters()`.
    value: what the optimizer updates, without a graph, of any shape: the fp32 master copy where there is one (ZeRO's
        slice; AdamW's under bf16_master, from its first update on), else the parameter itself, fp32 or bf16. Writing
        in place counts after `Engine.wrote`.
    gradient: of the same shape, meaned over the ranks, after the last backward of a window; None outside of a window,
        for a parameter that is not trained now, and for one without a gradient. Writing in place counts in the norm
        and in the step.
    shape: of the whole parameter.
    start: the place of value's first element in the whole, in C order.
    box: the offsets of value in the whole where it is a box of value's shape; None where it is the run of elements
        from `start` on.
    copies: how many ranks hold these elements: summed over ranks, f(value) / copies counts each once.
    writes: whether this rank is the one of them that saves.
    """

    name: str
    value: Tensor
    gradient: Tensor | None
    shape: tuple[int, ...]
    start: int
    box: tuple[int, ...] | None = None
    copies: int = 1
    writes: bool = True

    def positions(self) -> Tensor:
        """The place of each element in the whole, in C order: int64 of value's shape, on its device. What is drawn or
        computed from it is the same on every engine and number of ranks."""
        device = self.value.device
        if self.box is None:
            return torch.arange(self.start, self.start + self.value.numel(), device=device).view(
                self.value.shape
            )
        places = torch.zeros((), dtype=torch.int64, device=device)
        for axis, (at, size) in enumerate(zip(self.box, self.value.shape, strict=True)):
            along = torch.arange(at, at + size, device=device) * prod(self.shape[axis + 1 :])
            places = places.unsqueeze(-1) + along
        return places

    def of(self, whole: Tensor) -> Tensor:
        """This rank's elements of a tensor of the whole's shape, of value's shape; a view where it can be one."""
        if self.box is None:
            return whole.reshape(-1)[self.start : self.start + self.value.numel()].view(self.value.shape)
        return whole[tuple(slice(at, at + size) for at, size in zip(self.box, self.value.shape, strict=True))]


def flat_start(box: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The place in C order of the element at these offsets."""
    return sum(at * prod(shape[axis + 1 :]) for axis, at in enumerate(box))


def shard_state(shards: Iterable[Shard], state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, State]:
    """What this rank saves of `state`, parameter's name → key → tensor of its shard's shape: whole tensors or Pieces,
    as `Engine.optimizer_state` has them. Names that `state` lacks are left out."""
    found: dict[str, State] = {}
    for shard in shards:
        if shard.name not in state or not shard.writes or shard.value.numel() == 0:
            continue
        found[shard.name] = {}
        for key, tensor in state[shard.name].items():
            assert tensor.shape == shard.value.shape, f"{shard.name}.{key} is no shard of it"
            if tuple(tensor.shape) == shard.shape:
                found[shard.name][key] = tensor
            elif shard.box is None:
                found[shard.name][key] = Piece(tensor.reshape(-1), shard.shape, shard.start)
            else:
                found[shard.name][key] = Piece(tensor, shard.shape, shard.box)
    return found


def read_shard_state(shards: Iterable[Shard], saved: Saved) -> dict[str, dict[str, Tensor]]:
    """This rank's elements of what `shard_state` saved, by any engine on any number of ranks: parameter's name → key →
    tensor of its shard's shape, on its device, in memory of its own."""
    names = saved.names()
    found: dict[str, dict[str, Tensor]] = {}
    for shard in shards:
        if shard.name not in names:
            continue
        found[shard.name] = {}
        for key in saved.inner(shard.name):
            if shard.box is None:
                part = saved.run(shard.start, shard.value.numel(), shard.name, key)
            else:
                part = saved.box(shard.box, tuple(shard.value.shape), shard.name, key)
            found[shard.name][key] = part.view(shard.value.shape).to(shard.value.device)
    return found
