"""Sharpness-aware minimisation (`regularization.sharpness`): the gradient is taken not at the weights w but at w + ε,
where the loss is about highest within a ball around them.

SAM (Foret et al. 2021): ε = rho · g / ‖g‖. ASAM (Kwon et al. 2021): ε = rho · T²g / ‖Tg‖ with T = |w| + eta element by
element, here of every trained parameter, biases and norms too. g is the gradient of the whole global batch and its norm
that of the whole model, so that neither the batch's cut nor the model's can be told from the step. The second pass
draws the same dropout as the first. The loss in the log is the first pass's, `grad_norm` the second one's; penalties
are added after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tunesmith.engine import Engine
from tunesmith.engine.shards import Shard
from tunesmith.gradients import local_square_sum
from tunesmith.parts import Window
from tunesmith.recipe.regularization import ASAM, SAM
from tunesmith.shard_sums import over_shards


class Sharpness:
    """A `Gradients` of two passes over a window. It holds one copy of this rank's shards meanwhile."""

    def __init__(self, settings: SAM | ASAM) -> None:
        self.settings = settings

    def __call__(self, window: Window, once: Callable[[], Tensor]) -> Tensor:
        losses = once()
        if window.step % self.settings.every:
            return losses
        engine = window.engine
        held = self._climb(engine)
        # dropped before the next pass adds to it; the weights stay where they were moved to
        engine.discard()
        engine.wrote()
        once()
        with torch.no_grad():
            for shard in engine.shards():
                if shard.name in held:
                    shard.value.copy_(held[shard.name])
        engine.wrote()
        return losses

    @torch.no_grad()
    def _climb(self, engine: Engine) -> dict[str, Tensor]:
        """Moves the shards' values by ε, and returns what they were, by name."""
        shards = [shard for shard in engine.shards() if shard.gradient is not None]
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        for shard in shards:
            slope = self._slope(shard)
            total += local_square_sum([slope]).to(engine.device) / shard.copies
        # fp16's loss scale is in both of g and ‖g‖
        factor = (self.settings.rho / (over_shards(engine, total).sqrt() + 1e-12)).float()
        held: dict[str, Tensor] = {}
        for shard in shards:
            held[shard.name] = shard.value.clone()
            slope = self._slope(shard)
            if isinstance(self.settings, ASAM):
                slope = slope * (shard.value.abs() + self.settings.eta)
            shard.value.add_(slope * factor.to(slope.device))
        return held

    def _slope(self, shard: Shard) -> Tensor:
        """g, or Tg."""
        assert shard.gradient is not None
        if isinstance(self.settings, SAM):
            return shard.gradient
        return shard.gradient * (shard.value.abs() + self.settings.eta)
