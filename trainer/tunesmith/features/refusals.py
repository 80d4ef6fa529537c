"""Why a run's features cannot be cached: whatever changes what the backbone makes of a row while the run goes on."""

from __future__ import annotations

from torch import nn

from tunesmith.engine import Engine
from tunesmith.errors import UserError
from tunesmith.features.reading import KEY
from tunesmith.objectives import Objective
from tunesmith.recipe import Recipe
from tunesmith.recipe.trainable import Gradual

_OBJECTIVES = ("classification", "token_classification", "question_answering")


def refuse(recipe: Recipe, engine: Engine, objective: Objective) -> None:
    """Raises UserError with the setting that stands in the way, and what to do."""
    model = engine.train_module.model
    problem = _of_recipe(recipe) or _of_engine(recipe, engine) or _of_model(model)
    if problem is None and type(objective).draw is not Objective.draw:
        problem = "the objective draws each row anew in every epoch"
    if problem is not None:
        raise UserError(f"{KEY}: {problem}; or set cache_features: false")


def _of_recipe(recipe: Recipe) -> str | None:
    settings, model = recipe.trainable, recipe.model
    if recipe.objective.type not in _OBJECTIVES:
        return f"objective.type: {recipe.objective.type} has no head on a backbone ({', '.join(_OBJECTIVES)} have)"
    if settings.adapters:
        return "trainable.adapters change the backbone while they are trained: leave them out"
    if isinstance(settings.unfreeze, Gradual):
        return "trainable.unfreeze unfreezes the backbone layer by layer: leave it out"
    if any(later.parameters != ["head"] for later in settings.later):
        return (
            "trainable.unfreeze trains parts of the backbone later on: leave `at` out, or name [head] alone"
        )
    if model.neftune_noise_alpha is not None:
        return "model.neftune_noise_alpha adds other noise in every epoch: leave it out"
    if model.drop_path is not None:
        return "model.drop_path has no effect on a frozen backbone: leave it out"
    if model.gradient_checkpointing:
        return "model.gradient_checkpointing has no effect where the backbone is not run: leave it out"
    if recipe.data.packing:
        return "data.packing makes other sequences of the rows in every epoch: set packing: false"
    return None


def _of_engine(recipe: Recipe, engine: Engine) -> str | None:
    if not engine.sharded:
        return None
    return (
        f"parallel.strategy: {recipe.parallel.strategy} spreads a backbone that is not run over the ranks: "
        "use ddp, zero1 or zero2"
    )


def _of_model(model: nn.Module) -> str | None:
    backbone = getattr(model, "base_model", model)
    if backbone is model:
        return f"{type(model).__name__} has no backbone beneath its head"
    names = {id(p): name for name, p in model.named_parameters()}
    trained = [names[id(p)] for p in backbone.parameters() if p.requires_grad]
    if trained:
        more = f" (and {len(trained) - 1} more)" if len(trained) > 1 else ""
        return f"{trained[0]}{more} of the backbone is trained: set trainable.freeze: [backbone]"
    return None
