"""Penalties on the size of the weights (`regularization.l1`, `.l2`).

L1: c·Σ|w|, with the gradient c·sign(w), 0 at 0 (Tibshirani 1996). L2: c·½Σw², with the gradient c·w (Hoerl & Kennard
1970). Both are added to the gradient once per optimizer step, before its norm is taken: they are clipped with it, and
an adaptive optimizer scales them, which sets L2 apart from the decoupled `optim.weight_decay` (Loshchilov & Hutter
2019)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tunesmith.data.stream import Stream
from tunesmith.engine import Engine
from tunesmith.gradients import local_square_sum
from tunesmith.parts import StepPart
from tunesmith.regularization.selection import trained
from tunesmith.shard_sums import over_shards

_ROW = 512  # elements that are summed in fp32, as in `gradients`


class WeightPenalty(StepPart):
    """`name` says which one. `asked`: names of parameters, as in `Shard`; None: those that weight decay takes. Of them,
    only those that are trained in a step are penalised in it, and counted in the penalty's value."""

    def __init__(self, name: Literal["l1", "l2"], coefficient: float, asked: frozenset[str] | None) -> None:
        self.name = name
        self.coefficient = coefficient
        self._asked = asked

    def begin(self, engine: Engine, stream: Stream) -> None:
        self._engine = engine
        self._names = trained(engine, self._asked, f"regularization.{self.name}")

    @torch.no_grad()
    def penalize(self, step: int, scale: Tensor) -> Tensor:
        device = self._engine.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for shard in self._engine.shards():
            if shard.gradient is None or shard.name not in self._names:
                continue
            value = shard.value.float()
            slope = value.sign() if self.name == "l1" else value
            shard.gradient.add_(slope * (scale.to(value.device) * self.coefficient))
            total += penalty(self.name, value).to(device) / shard.copies
        return over_shards(self._engine, total * self.coefficient)


def penalty(name: str, value: Tensor) -> Tensor:
    """Σ|w| or ½Σw² of an fp32 tensor: 0-dim fp64, of short sums, so that shards cannot be told from the whole."""
    if name == "l2":
        return local_square_sum([value]) / 2
    flat = value.reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), ord=1, dim=1)
    return rows.double().sum() + flat[whole:].abs().double().sum()
