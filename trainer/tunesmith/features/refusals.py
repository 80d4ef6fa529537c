"""Why a run's features cannot be cached, as far as the recipe's own rules cannot tell."""

from __future__ import annotations

from torch import nn

from tunesmith.engine import Engine
from tunesmith.errors import UserError
from tunesmith.features.reading import KEY
from tunesmith.objectives import Objective
from tunesmith.recipe import Recipe


def refuse(recipe: Recipe, engine: Engine, objective: Objective) -> None:
    """Raises UserError with the setting that stands in the way, and what to do."""
    problem = _of_engine(recipe, engine) or _of_model(engine.train_module.model)
    if problem is None and recipe.model.gradient_checkpointing:
        problem = "model.gradient_checkpointing has no effect where the backbone is not run: leave it out"
    if problem is None and type(objective).draw is not Objective.draw:
        problem = "the objective draws each row anew in every epoch"
    if problem is not None:
        raise UserError(f"{KEY}: {problem}; or set cache_features: false")


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
