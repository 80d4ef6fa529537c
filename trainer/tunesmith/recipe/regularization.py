"""`regularization`: what keeps the weights, or the function, simple while they are trained."""

from __future__ import annotations

from tunesmith.recipe.base import NonNegativeFloat, Section


class Regularization(Section):
    """Penalties on the weights that are trained, all of them over the whole model whatever shards it: `l1` × Σ|w|,
    `l2` × ½Σw² (through the gradient and so through Adam's scaling; `optim.weight_decay` is the decoupled one)."""

    l1: NonNegativeFloat = 0.0
    l2: NonNegativeFloat = 0.0
