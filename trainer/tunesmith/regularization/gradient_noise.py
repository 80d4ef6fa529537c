"""Gradient noise (`regularization.gradient_noise`; Neelakantan et al. 2015, "Adding Gradient Noise Improves Learning
for Very Deep Networks"): g ← g + N(0, σ²) with σ² = eta / (1 + t)^gamma for every element, t the step from 0.

It is added to the gradient as clipping leaves it: σ√n is the noise's norm over n elements, which before the clipping
would be most of the gradient's, and clipped away together with it. `grad_norm` in the log is without it.

An element's noise is a function of (seed, step, the parameter's name, its place in the parameter, the kind of device):
normal numbers are drawn in blocks of a fixed size, each from a generator of its own, so that a shard draws the blocks
that it has a part of."""

from __future__ import annotations

from hashlib import blake2b
from math import prod, sqrt

import torch
from torch import Tensor

from tunesmith.data.stream import Stream
from tunesmith.engine import Engine
from tunesmith.engine.shards import Shard
from tunesmith.parts import StepPart
from tunesmith.recipe.regularization import GradientNoise as Settings

BLOCK = 1 << 18


class GradientNoise(StepPart):
    name = "gradient_noise"

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings = settings
        self._seed = seed

    def begin(self, engine: Engine, stream: Stream) -> None:
        self._engine = engine

    def deviation(self, step: int) -> float:
        """σ at a step (from 0)."""
        return sqrt(self.settings.eta / (1 + step) ** self.settings.gamma)

    @torch.no_grad()
    def disturb(self, step: int, coefficient: Tensor) -> None:
        sigma = self.deviation(step)
        for shard in self._engine.shards():
            if shard.gradient is None:
                continue
            # the step multiplies by the coefficient
            noise = shard_noise(shard, self._seed, step)
            shard.gradient.add_(noise.mul_(sigma / coefficient.to(noise.device)))


def shard_noise(shard: Shard, seed: int, step: int) -> Tensor:
    """Standard normal numbers for a shard's elements: fp32, of its value's shape, on its device."""
    value, count = shard.value, shard.value.numel()
    if count == 0:
        return torch.empty_like(value, dtype=torch.float32)
    if shard.box is None or tuple(value.shape[1:]) == shard.shape[1:]:
        return normal(shard.name, shard.start, count, seed, step, value.device).view(value.shape)
    # a part of every row: drawn with what lies between
    places = shard.positions() - shard.start
    span = _span(tuple(value.shape), shard.shape)
    return normal(shard.name, shard.start, span, seed, step, value.device)[places]


def _span(part: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """From the first to the last element of a box in C order, both counted."""
    return 1 + sum((size - 1) * prod(shape[axis + 1 :]) for axis, size in enumerate(part))


def normal(name: str, start: int, count: int, seed: int, step: int, device: torch.device) -> Tensor:
    """Standard normal numbers for the places start to start + count of a parameter: fp32 [count]."""
    found = torch.empty(count, device=device)
    generator = torch.Generator(device)
    for block in range(start // BLOCK, (start + count - 1) // BLOCK + 1):
        key = blake2b(f"{seed} {step} {block} {name}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(key, "little") >> 1)
        drawn = torch.randn(BLOCK, generator=generator, device=device)
        low, high = max(start, block * BLOCK), min(start + count, (block + 1) * BLOCK)
        found[low - start : high - start] = drawn[low - block * BLOCK : high - block * BLOCK]
    return found
