"""`remember.replay`: the run as one of two tasks, the new rows and those of the run that is to be remembered."""

from __future__ import annotations

from typing import Any

from tunesmith.errors import UserError
from tunesmith.recipe import Recipe, rules
from tunesmith.recipe.remember import Probe, Remember, replayed_rows
from tunesmith.recipe.tasks import Multitask, Task, TaskEvaluation, TogetherMixing

NEW, OLD = "new", "old"
_EACH = ("metrics", "metric_for_best", "greater_is_better")  # what is a task's own where there are several
_KEY = "remember.replay"


def replayed(recipe: Recipe) -> Recipe:
    """The recipe without `remember.replay`: the tasks `new` and `old` on one backbone, of whose rows every window has
    as many as the ratio says, an epoch being the new task's. A window's loss is the mean over its rows: both tasks'
    means, by the share of the rows that each has (Robins 1995; Rolnick et al. 2019 for a model that is fine-tuned).
    The old run becomes a probe. Raises UserError for what several tasks do not have."""
    settings = recipe.remember
    if settings is None or settings.replay is None:
        return recipe
    assert settings.run is not None, "the recipe's rules ask for it"
    whole = recipe.training.global_batch_size
    old = replayed_rows(settings.replay, whole)
    own = {name: getattr(recipe.evaluation, name) for name in _EACH}
    new_task = Task(
        data=recipe.data,
        objective=recipe.objective,
        head=recipe.trainable.head,
        weight=1.0 - old / whole,
        evaluation=TaskEvaluation(**{name: value for name, value in own.items() if value is not None}),
    )
    changes: dict[str, Any] = {
        "data": None,
        "objective": None,
        "tasks": {NEW: new_task, OLD: Task(run=settings.run, weight=old / whole)},
        "multitask": Multitask(
            mixing=TogetherMixing(type="together", rows={NEW: whole - old, OLD: old}, epoch=NEW)
        ),
        "trainable": recipe.trainable.model_copy(update={"head": None}),
        "evaluation": recipe.evaluation.model_copy(update=dict.fromkeys(_EACH)),
        "remember": _others(settings),
    }
    made = recipe.model_copy(update=changes)
    if problems := rules.check(made, Recipe.model_fields):
        told = f"{problems[0].key}: {problems[0].message}"
        raise UserError(f"{_KEY}: makes the run one of two tasks, new and old. {told}")
    return made


def _others(settings: Remember) -> Remember:
    """What is left of `remember`; the run that it names is a probe now, unless a probe names it."""
    assert settings.run is not None
    known = {probe.run for probe in settings.probes.values()}
    probes = settings.probes if settings.run in known else {OLD: Probe(run=settings.run), **settings.probes}
    return settings.model_copy(update={"run": None, "replay": None, "probes": probes})
