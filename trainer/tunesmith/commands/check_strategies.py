"""What `tunesmith check` builds of a recipe's strategies: all that a step computes, and little of what a run computes
once before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunesmith.commands.findings import Finding, fine
from tunesmith.data.stream import Stream
from tunesmith.engine import Engine
from tunesmith.parts import Strategies
from tunesmith.recipe import Recipe

_FISHER_ROWS = 8


def rehearsed(recipe: Recipe) -> Recipe:
    """The recipe whose strategies a check builds: without answers of a teacher for all training rows, and with a Fisher
    information of a few rows."""
    changes: dict[str, Any] = {}
    if recipe.distill is not None and (recipe.distill.offline or recipe.distill.sequences):
        changes["distill"] = None
    if recipe.remember is not None and (ewc := recipe.remember.ewc) is not None:
        few = ewc.model_copy(update={"rows": min(ewc.rows, _FISHER_ROWS)})
        changes["remember"] = recipe.remember.model_copy(update={"ewc": few})
    return recipe.model_copy(update=changes)


def begin(strategies: Strategies, engine: Engine, stream: Stream) -> None:
    """As a run does it once the engine has prepared the model."""
    for part in strategies.forward:
        part.begin(engine)
    for part in strategies.steps:
        part.begin(engine, stream)


def strategy_findings(recipe: Recipe, strategies: Strategies) -> Iterator[Finding]:
    """What is computed in every step beside the plain one, and what of it a check leaves out."""
    names = [*recipe.regularization.model_dump(exclude_defaults=True)]
    parts = [part.name for part in (*strategies.terms, *strategies.steps)]
    names += [name for name in dict.fromkeys(parts) if name not in names]
    if names:
        yield fine("strategies", f"in every step: {', '.join(names)}")
    for note in strategies.notes:
        yield fine("strategies", note)
    if rehearsed(recipe).distill is not recipe.distill:
        yield fine("strategies", "the teacher's answers to all rows are computed by the run; not timed here")
    elif recipe.distill is not None and recipe.distill.on_policy is not None:
        yield fine("strategies", "what the student writes itself is not timed here")
