"""What several tasks add to a run: the balancing of their losses, and their early stopping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from tunesmith.parts import Strategies
from tunesmith.recipe.evaluation import EarlyStopping
from tunesmith.recipe.tasks import DWA, FixedWeights, GradNorm, UncertaintyWeighting
from tunesmith.tasks.objective import TaskObjective
from tunesmith.tasks.stopping import Stopping
from tunesmith.tasks.stream import TaskStream

if TYPE_CHECKING:
    from tunesmith.strategies import Building


def build(building: Building) -> Strategies:
    """Nothing for a run of one task."""
    objective = building.objective
    if not isinstance(objective, TaskObjective):
        return Strategies()
    found = _balancing(building, objective)
    asked: dict[str, tuple[EarlyStopping, tuple[str, bool]]] = {
        name: (part.evaluation.early_stopping, part.metric)
        for name, part in objective.parts.items()
        if part.evaluation.early_stopping is not None
    }
    if asked:
        found |= Strategies(steps=(Stopping(asked),))
    return found | Strategies(facts=_facts(building, objective))


def _balancing(building: Building, objective: TaskObjective) -> Strategies:
    settings = building.recipe.multitask.balancing
    trained = [name for name, part in objective.parts.items() if part.trained]
    match settings:
        case FixedWeights():
            return Strategies()
        case UncertaintyWeighting():
            from tunesmith.tasks.uncertainty import build_uncertainty

            rate = building.recipe.optim.learning_rate
            found, names = build_uncertainty(settings, objective, trained)
            building.built.lr_scale.update(dict.fromkeys(names, settings.learning_rate / rate))
            return found
        case DWA():
            from tunesmith.tasks.dwa import DynamicWeightAverage

            every = building.stream.steps_per_epoch if settings.every == "epoch" else settings.every
            part = DynamicWeightAverage(objective, trained, settings.temperature, every)
            return Strategies(steps=(part,))
        case GradNorm():
            from tunesmith.tasks.gradnorm import GradientNormalization

            balancing = GradientNormalization(objective, trained, settings, building.built.model)
            return Strategies(steps=(balancing,), forward=(balancing.watch,))


def _facts(building: Building, objective: TaskObjective) -> dict[str, Any]:
    stream = cast(TaskStream, building.stream)
    about = {
        name: {
            "objective": type(part.objective).__name__,
            "weight": part.weight,
            "windows_per_epoch": stream.streams[name].steps_per_epoch if part.trained else 0,
        }
        for name, part in objective.parts.items()
    }
    multitask = building.recipe.multitask.model_dump(mode="json")
    return {"tasks": about, **multitask}
