"""What keeps the weights, or the function, simple: each file is one method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tunesmith.parts import ForwardPart, StepPart, Strategies, plain_gradients, plain_micro_step
from tunesmith.recipe.regularization import WeightPenalty as PenaltySettings
from tunesmith.regularization.adversarial import Adversarial, Perturbation
from tunesmith.regularization.gradient_noise import GradientNoise
from tunesmith.regularization.max_norm import MaxNorm
from tunesmith.regularization.penalties import WeightPenalty
from tunesmith.regularization.r_drop import TwoViews, divergences
from tunesmith.regularization.selection import named
from tunesmith.regularization.sharpness import Sharpness
from tunesmith.terms import Term

if TYPE_CHECKING:
    from tunesmith.strategies import Building


def build(building: Building) -> Strategies:
    """What `regularization` asks for."""
    recipe, model = building.recipe, building.built.model
    settings = recipe.regularization
    terms: tuple[Term, ...] = ()
    forward: list[ForwardPart] = []
    micro_step = plain_micro_step
    if settings.r_drop is not None:
        terms = divergences(building.objective.terms, settings.r_drop.alpha)
        forward.append(TwoViews(bool(recipe.model.drop_path or recipe.model.neftune_noise_alpha)))
    if settings.adversarial is not None:
        perturbation = Perturbation(model)
        forward.append(perturbation)
        micro_step = Adversarial(settings.adversarial, perturbation)
    sharpness = settings.sharpness
    return Strategies(
        terms,
        tuple(forward),
        tuple(_step_parts(building)),
        micro_step,
        plain_gradients if sharpness is None else Sharpness(sharpness),
    )


def _step_parts(building: Building) -> list[StepPart]:
    settings, model = building.recipe.regularization, building.built.model
    found: list[StepPart] = []
    kinds: tuple[Literal["l1"], Literal["l2"]] = ("l1", "l2")
    for name in kinds:
        asked = settings.l1 if name == "l1" else settings.l2
        if isinstance(asked, PenaltySettings):
            names = named(model, asked.parameters, f"regularization.{name}.parameters")
            found.append(WeightPenalty(name, asked.coefficient, names))
        elif asked > 0:
            found.append(WeightPenalty(name, asked, None))
    if settings.gradient_noise is not None:
        found.append(GradientNoise(settings.gradient_noise, building.recipe.training.seed))
    if settings.max_norm is not None:
        names = named(model, settings.max_norm.parameters, "regularization.max_norm.parameters")
        found.append(MaxNorm(settings.max_norm.value, names))
    return found
