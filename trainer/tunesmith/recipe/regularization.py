"""`regularization`: what keeps the weights, or the function, simple while they are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.recipe.base import NonNegativeFloat, Positive, PositiveFloat, Section
from tunesmith.recipe.selectors import SelectorText


class WeightPenalty(Section):
    """`parameters`: which ones, in the words of `trainable.freeze`; none: those that weight decay takes, which are no
    norms and no biases."""

    coefficient: PositiveFloat
    parameters: list[SelectorText] = Field(default_factory=list[str])


class RDrop(Section):
    """Every row goes through the model twice, each time with dropout of its own, and alpha × the mean of KL(p₁‖p₂) and
    KL(p₂‖p₁) is added to the mean of the two losses (Liang et al. 2021)."""

    alpha: PositiveFloat = 1.0


class _Sharpness(Section):
    """`every`: in each k-th step, from the first on; the others are plain ones."""

    every: Positive = 1


class SAM(_Sharpness):
    """The gradient is that at w + rho·g/‖g‖ (Foret et al. 2021)."""

    type: Literal["sam"]
    rho: PositiveFloat = 0.05


class ASAM(_Sharpness):
    """As SAM, at w + rho·T²g/‖Tg‖ with T = |w| + eta, so that rescaled weights have the same sharpness (Kwon et al.
    2021)."""

    type: Literal["asam"]
    rho: PositiveFloat = 0.5
    eta: NonNegativeFloat = 0.01


class _Adversarial(Section):
    """`epsilon`: the L2 norm of what is added to a row's embeddings, all its tokens together. The loss is (1 − weight)
    × that of the rows as they are + weight × that of the perturbed ones."""

    epsilon: PositiveFloat = 0.3
    weight: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5


class FGM(_Adversarial):
    """One step of length epsilon along the gradient (Miyato et al. 2017)."""

    type: Literal["fgm"]


class PGD(_Adversarial):
    """`steps` steps of length `step_size` (null: 2.5 × epsilon / steps), each back into the ball of radius epsilon
    (Madry et al. 2018); the perturbed loss is the mean over the steps."""

    type: Literal["pgd"]
    steps: Annotated[int, Field(gt=1)] = 3
    step_size: PositiveFloat | None = None


class GradientNoise(Section):
    """Adds noise of variance eta / (1 + step)^gamma to every element of the clipped gradient (Neelakantan et al.
    2015)."""

    eta: PositiveFloat = 0.01
    gamma: NonNegativeFloat = 0.55


class MaxNorm(Section):
    """After every step, the weights that go into one unit (a row of a matrix) are scaled down to an L2 norm of `value`
    where it is greater (Srivastava et al. 2014). `parameters` as those of a penalty."""

    value: PositiveFloat
    parameters: list[SelectorText] = Field(default_factory=list[str])


class Regularization(Section):
    """Penalties on the weights that are trained, all of them over the whole model whatever shards it: `l1` × Σ|w|,
    `l2` × ½Σw² (through the gradient and so through Adam's scaling; `optim.weight_decay` is the decoupled one), each a
    number or `{coefficient, parameters}`; and what makes the function smooth: `r_drop`, `sharpness`, `adversarial`,
    `gradient_noise`, `max_norm`."""

    l1: NonNegativeFloat | WeightPenalty = 0.0
    l2: NonNegativeFloat | WeightPenalty = 0.0
    r_drop: RDrop | None = None
    sharpness: Annotated[SAM | ASAM, Field(discriminator="type")] | None = None
    adversarial: Annotated[FGM | PGD, Field(discriminator="type")] | None = None
    gradient_noise: GradientNoise | None = None
    max_norm: MaxNorm | None = None
