"""Penalties that hold weights near the values that the run begins with: L2-SP, layer-wise anchors, EWC."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.gradients import local_square_sum
from tunesmith.parts import StepPart
from tunesmith.regularization.penalties import penalty
from tunesmith.shard_sums import over_shards

if TYPE_CHECKING:
    from tunesmith.data.stream import Stream
    from tunesmith.engine import Engine
    from tunesmith.engine.shards import Shard

Strength = float | Callable[["Shard"], Tensor]
"""λ of a parameter's elements: one number, or a tensor of its shard's shape, fp32."""


class Anchored(StepPart):
    """½ Σ_i λ_i (w_i − c_i)² over the parameters named in `strengths`, c the weights that the run begins with, or 0
    for those named in `new`. Its gradient λ_i (w_i − c_i) is added to what the losses give, before the norm is taken
    and clipped, and goes through the optimizer as they do. Parameters that are not trained at a step have none.

    The centres are as large as the parameters that have one, fp32, sharded like them; a resumed run begins with the
    same."""

    def __init__(
        self, name: str, strengths: Mapping[str, Strength], new: frozenset[str] = frozenset()
    ) -> None:
        self.name = name
        self._strengths = strengths
        self._new = new
        self._engine: Engine
        self._centres: dict[str, Tensor] = {}
        self._of: dict[str, float | Tensor] = {}

    @torch.no_grad()
    def begin(self, engine: Engine, stream: Stream) -> None:
        self._engine = engine
        for shard in engine.shards():
            strength = self._strengths.get(shard.name)
            if strength is None:
                continue
            self._of[shard.name] = strength(shard).to(shard.value.device) if callable(strength) else strength
            if shard.name not in self._new:
                self._centres[shard.name] = shard.value.to(torch.float32, copy=True)

    @torch.no_grad()
    def penalize(self, step: int, scale: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for shard in self._engine.shards():
            strength = self._of.get(shard.name)
            if strength is None or shard.gradient is None:
                continue
            centre = self._centres.get(shard.name)
            apart = shard.value.float() if centre is None else shard.value.float() - centre
            factor = scale.to(apart.device)
            if isinstance(strength, float):
                half = local_square_sum([apart]) * (strength / 2)
                pull, factor = apart, factor * strength
            else:
                pull = apart * strength
                half = penalty("l1", pull * apart) / 2  # of which no element is negative
            if shard.gradient.dtype == torch.float32:
                shard.gradient.addcmul_(pull, factor)
            else:
                shard.gradient.add_((pull * factor).to(shard.gradient.dtype))
            total += half.to(total.device) / shard.copies
        return over_shards(self._engine, total)


class Interpolated(StepPart):
    """WiSE-FT (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models"): what `final/` gets is
    (1 − alpha) w₀ + alpha w, w₀ the weights that the run begins with; the parameters named in `new` keep w."""

    name = "wise_ft"

    def __init__(self, alpha: float, new: frozenset[str]) -> None:
        self._alpha = alpha
        self._new = new
        self._engine: Engine
        self._start: dict[str, Tensor]

    @torch.no_grad()
    def begin(self, engine: Engine, stream: Stream) -> None:
        self._engine = engine
        self._start = {
            s.name: s.value.to(torch.float32, copy=True) for s in engine.shards() if s.name not in self._new
        }

    @torch.no_grad()
    def settle(self) -> None:
        for shard in self._engine.shards():
            if (start := self._start.get(shard.name)) is not None:
                shard.value.copy_(torch.lerp(start, shard.value.float(), self._alpha))
        self._engine.wrote()
