"""The rules of `data.sampling`, `data.curriculum`, `data.max_length_schedule` and of what is decided after training:
`evaluation.tune_thresholds` and `evaluation.calibrate`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from tunesmith.recipe.faults import Problem, problem_at

if TYPE_CHECKING:
    from tunesmith.recipe.root import Recipe


def _sampling(recipe: Recipe) -> Iterator[Problem]:
    if recipe.data.sampling is None:
        return
    objective = recipe.objective
    if objective.type not in {"classification", "token_classification"}:
        yield problem_at(
            "data.sampling",
            f"draws rows by their label; {objective.type} has none: use the weight of a source",
        )
    elif objective.type == "classification" and objective.problem == "regression":
        yield problem_at("data.sampling", "draws rows by their label; problem: regression has none")
    sampling = recipe.data.sampling
    if sampling.type == "temperature" and sampling.temperature == 1:
        yield problem_at("data.sampling.temperature", "1 has no effect: it draws each row once")


def _curriculum(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    for name in ("curriculum", "max_length_schedule"):
        if getattr(data, name) is not None and not data.shuffle:
            yield problem_at(
                f"data.{name}", "and shuffle: false exclude each other: both say the order of the rows"
            )
    if data.max_length_schedule is None:
        return
    key = "data.max_length_schedule"
    stages = data.max_length_schedule.stages
    for number, stage in enumerate(stages):
        if stage.max_length >= data.max_length:
            yield problem_at(
                f"{key}.stages.{number}.max_length",
                f"must be below data.max_length ({data.max_length}), which holds after the last stage",
            )
    for number, (before, after) in enumerate(pairwise(stages), start=1):
        # moments of different kinds are compared when the number of steps is known
        pair = before.until, after.until
        steps, shares = (
            [one for one in pair if isinstance(one, int)],
            [x for x in pair if isinstance(x, float)],
        )
        if any(len(same) == 2 and same[0] >= same[1] for same in (steps, shares)):
            yield problem_at(f"{key}.stages.{number}.until", "must be later than that of the stage before")
    if data.max_length_schedule.longer == "cut" and recipe.objective.type != "causal_lm":
        yield problem_at(
            f"{key}.longer",
            f"cut is for causal_lm, whose rows may end anywhere; for {recipe.objective.type} write wait",
        )


def _moments(recipe: Recipe) -> Iterator[Problem]:
    data, steps = recipe.data, recipe.training.max_steps
    if steps is None:
        return
    if data.curriculum is not None and isinstance(until := data.curriculum.pace.until, int) and until > steps:
        yield problem_at(
            "data.curriculum.pace.until",
            f"step {until} is behind training.max_steps: {steps}: some rows never come",
        )
    if data.max_length_schedule is not None:
        for number, stage in enumerate(data.max_length_schedule.stages):
            if isinstance(stage.until, int) and stage.until > steps:
                yield problem_at(
                    f"data.max_length_schedule.stages.{number}.until",
                    f"step {stage.until} is behind training.max_steps: {steps}",
                )


def _decisions(recipe: Recipe) -> Iterator[Problem]:
    evaluation, data, objective = recipe.evaluation, recipe.data, recipe.objective
    evaluates = bool(data.eval) or (data.split is not None and data.split.eval > 0)
    for name in ("tune_thresholds", "calibrate"):
        if getattr(evaluation, name) is None:
            continue
        if objective.type != "classification" or objective.problem == "regression":
            problem = " with problem: regression" if objective.type == "classification" else ""
            yield problem_at(
                f"evaluation.{name}", f"is for classification with labels, not for {objective.type}{problem}"
            )
        elif not evaluates:
            yield problem_at(
                f"evaluation.{name}", "is fitted on evaluation rows: set data.eval or data.split.eval"
            )


def _tasks(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.tasks:
        return
    for name, task in recipe.tasks.items():
        for key in ("curriculum", "max_length_schedule"):
            if task.data is not None and getattr(task.data, key) is not None:
                yield problem_at(
                    f"tasks.{name}.data.{key}",
                    "goes by the steps of the run, of which a task has a part: train the task alone",
                )
    for key in ("tune_thresholds", "calibrate"):
        if getattr(recipe.evaluation, key) is not None:
            yield problem_at(
                f"evaluation.{key}", "is for a run of one task: decide in a run of the task alone"
            )


RULES = (
    ({"data", "objective"}, _sampling),
    ({"data", "objective"}, _curriculum),
    ({"data", "training"}, _moments),
    ({"evaluation", "data", "objective"}, _decisions),
    ({"tasks", "evaluation"}, _tasks),
)
