"""`optim`: the optimizer, told apart by `name`. Betas, eps and the rest are the optimizer's own fields, so a
setting without effect cannot be written."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.recipe.base import Fraction, NonNegativeFloat, PositiveFloat, Section

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
# YAML has lists only, which strict pydantic does not take for a tuple
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]


class _Optimizer(Section):
    """`max_grad_norm` clips the norm of the whole gradient; null clips nothing."""

    learning_rate: NonNegativeFloat = 5e-5
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat | None = 1.0


class AdamW(_Optimizer):
    """Loshchilov & Hutter 2019."""

    name: Literal["adamw"] = "adamw"
    betas: Betas = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class Adam(_Optimizer):
    """Kingma & Ba 2015; `weight_decay` is L2, added to the gradient."""

    name: Literal["adam"]
    betas: Betas = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class SGD(_Optimizer):
    name: Literal["sgd"]
    momentum: Fraction = 0.0
    nesterov: bool = False


class RMSprop(_Optimizer):
    name: Literal["rmsprop"]
    alpha: Fraction = 0.99
    eps: PositiveFloat = 1e-8
    momentum: Fraction = 0.0


class Adagrad(_Optimizer):
    name: Literal["adagrad"]
    eps: PositiveFloat = 1e-10
    initial_accumulator_value: NonNegativeFloat = 0.0


class Adafactor(_Optimizer):
    """Shazeer & Stern 2018, with the recipe's own learning rate."""

    name: Literal["adafactor"]
    beta2_decay: float = -0.8
    eps: Annotated[tuple[PositiveFloat | None, PositiveFloat], Field(strict=False)] = (None, 1e-3)
    clip_threshold: PositiveFloat = 1.0


class AdamW8bit(_Optimizer):
    """bitsandbytes' block-wise 8-bit AdamW (Dettmers et al. 2022)."""

    name: Literal["adamw_8bit"]
    betas: Betas = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class Lion8bit(_Optimizer):
    """bitsandbytes' 8-bit Lion (Chen et al. 2023)."""

    name: Literal["lion_8bit"]
    betas: Betas = (0.9, 0.99)


Optim = Annotated[
    AdamW | Adam | SGD | RMSprop | Adagrad | Adafactor | AdamW8bit | Lion8bit, Field(discriminator="name")
]
