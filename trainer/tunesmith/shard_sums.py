"""Sums over the parameters of the whole model, whatever shards it."""

from __future__ import annotations

from torch import Tensor

from tunesmith.engine import Engine


def over_shards(engine: Engine, local: Tensor) -> Tensor:
    """The sum over all ranks of what each found on its shards, f(value) / copies: `Engine.sum` counts ranks that
    compute one batch together once, but each of them has shards of its own."""
    return engine.sum(local) * (engine.world_size // engine.mean_size)
