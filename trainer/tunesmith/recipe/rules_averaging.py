"""The rules of `averaging`: what would have no effect, and what would choose by other weights than it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tunesmith.recipe.averaging import EMA
from tunesmith.recipe.faults import Problem, problem_at

if TYPE_CHECKING:
    from tunesmith.recipe.root import Recipe


def _effect(recipe: Recipe) -> Iterator[Problem]:
    averaging, data = recipe.averaging, recipe.data
    if averaging is None:
        return
    evaluates = bool(data.eval) or (data.split is not None and data.split.eval > 0)
    if averaging.final == "current" and (averaging.evaluate == "current" or not evaluates):
        yield problem_at("averaging", "has no effect: neither final/ nor an evaluation has the average")
    elif not evaluates and "evaluate" in averaging.model_fields_set:
        yield problem_at(
            "averaging.evaluate", "has no effect without evaluations: set data.eval or data.split.eval"
        )
    elif evaluates and averaging.final != averaging.evaluate and recipe.checkpoint.final == "best":
        yield problem_at(
            "averaging.evaluate",
            f"{averaging.evaluate} and final: {averaging.final} would choose the best by other weights than final/ "
            "gets: make them equal, or set checkpoint.final: last",
        )


def _start(recipe: Recipe) -> Iterator[Problem]:
    averaging, steps = recipe.averaging, recipe.training.max_steps
    if averaging is None or steps is None:
        return
    every = averaging.update_every if isinstance(averaging, EMA) else averaging.every
    if isinstance(averaging.start, int) and averaging.start >= steps:
        yield problem_at(
            "averaging.start", f"step {averaging.start} is not before the last of training.max_steps: {steps}"
        )
    elif isinstance(every, int) and every > steps:
        key = "update_every" if isinstance(averaging, EMA) else "every"
        yield problem_at(f"averaging.{key}", f"{every} steps are more than training.max_steps: {steps}")


RULES = (
    ({"averaging", "data", "checkpoint"}, _effect),
    ({"averaging", "training"}, _start),
)
