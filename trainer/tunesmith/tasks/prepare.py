"""The objectives, rows and streams of the tasks of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.prepare import Dataset, prepare
from tunesmith.data.stream import Stream
from tunesmith.objectives import Objective, build_objective
from tunesmith.recipe import Recipe
from tunesmith.recipe.tasks import TogetherMixing
from tunesmith.tasks.datasets import TaskDataset, joined
from tunesmith.tasks.mixing import Schedule, shares
from tunesmith.tasks.objective import Task, TaskObjective
from tunesmith.tasks.stream import TaskStream


def build_objectives(recipe: Recipe, tokenizer: Any) -> TaskObjective:
    """The tasks' objectives; the labels are not known yet."""
    return TaskObjective(
        {
            name: Task(name, build_objective(recipe.view(name), tokenizer), task.weight, task.evaluation)
            for name, task in recipe.tasks.items()
        }
    )


def prepare_rows(
    recipe: Recipe, base: Path, objective: Objective, tokenizer_hash: str, device: torch.device
) -> dict[str, Dataset]:
    """As `data.prepare.prepare`; of several tasks split → the rows of all that have it, of which only those that are
    trained have training rows. Fits every objective."""
    if not isinstance(objective, TaskObjective):
        return prepare(recipe.data, base, objective, tokenizer_hash, translate_on=device)
    found: dict[str, dict[str, Dataset]] = {}
    for name, part in objective.parts.items():
        data = recipe.view(name).data
        own = prepare(data, base, part.objective, tokenizer_hash, translate_on=device)
        found[name] = {split: rows for split, rows in own.items() if part.trained or split != "train"}
    return joined(found)


def flat(datasets: dict[str, Dataset]) -> dict[str, Dataset]:
    """The tables that there are on disk, each under a name."""
    found: dict[str, Dataset] = {}
    for split, rows in datasets.items():
        if isinstance(rows, TaskDataset):
            found |= {f"{task} {split}": own for task, own in rows.parts.items()}
        else:
            found[split] = rows
    return found


def window_rows(recipe: Recipe, trained: list[str]) -> dict[str, int]:
    """The rows that each task has in a window that it is in."""
    whole, mixing = recipe.training.global_batch_size, recipe.multitask.mixing
    if not isinstance(mixing, TogetherMixing):
        return dict.fromkeys(trained, whole)
    if mixing.rows is not None:
        return {name: mixing.rows[name] for name in trained}
    each, more = divmod(whole, len(trained))
    return {name: each + (number < more) for number, name in enumerate(trained)}


def task_view(recipe: Recipe, name: str, rows: int) -> Recipe:
    """The recipe as the task's own stream sees it: `rows` to a window."""
    view = recipe.view(name)
    return view.model_copy(update={"training": view.training.model_copy(update={"global_batch_size": rows})})


def join_streams(
    recipe: Recipe,
    dataset: TaskDataset,
    streams: dict[str, Stream],
    objective: TaskObjective,
    count_steps: Callable[[Recipe, Stream], int],
) -> TaskStream:
    """The stream of all, by the recipe's mixing."""
    mixing, windows = recipe.multitask.mixing, [one.steps_per_epoch for one in streams.values()]
    schedule = Schedule(list(streams), shares(mixing, windows, 1))
    epoch = mixing.epoch if isinstance(mixing, TogetherMixing) else None
    stream = TaskStream(dataset, streams, objective, schedule, epoch)
    schedule.shares = shares(mixing, windows, count_steps(recipe, stream))  # which annealing needs
    return stream
