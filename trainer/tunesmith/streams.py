"""The recipe's training rows as the stream that the loop reads, and how many steps it is."""

from __future__ import annotations

from math import ceil
from typing import Any

from tunesmith.data.augment.pairs import augmentation
from tunesmith.data.order import Order
from tunesmith.data.ordering import build_order, with_curriculum
from tunesmith.data.prepare import Dataset
from tunesmith.data.stream import Stream
from tunesmith.objectives import Objective
from tunesmith.recipe import Recipe
from tunesmith.tasks.datasets import TaskDataset
from tunesmith.tasks.objective import TaskObjective
from tunesmith.tasks.prepare import join_streams, task_view, window_rows


def build_stream(recipe: Recipe, dataset: Dataset, objective: Objective) -> Stream:
    """The training rows in their order."""
    if isinstance(objective, TaskObjective) and isinstance(dataset, TaskDataset):
        rows = window_rows(recipe, list(dataset.parts))
        streams = {
            name: build_stream(task_view(recipe, name, rows[name]), own, objective.of(name))
            for name, own in dataset.parts.items()
        }
        return join_streams(recipe, dataset, streams, objective, count_steps)
    data, training = recipe.data, recipe.training
    drawn, facts = build_order(data, dataset, objective, training.global_batch_size, training.seed)
    order, limits = with_curriculum(drawn, data, dataset, objective, lambda: count_steps(recipe, drawn))
    pack_length = data.max_length if data.packing else None
    per_device = training.per_device_train_batch_size
    changes, collating = augmentation(data.augment, objective, dataset.table, dataset.variants)
    return Stream(dataset, order, collating, per_device, pack_length, changes, limits, facts)


def count_steps(recipe: Recipe, stream: Stream | Order) -> int:
    """`max_steps`, or the steps of the epochs (a part of an epoch rounds up to whole steps)."""
    if recipe.training.max_steps is not None:
        return recipe.training.max_steps
    epochs = recipe.training.epochs
    assert epochs is not None
    # 0.1 epochs of 30 steps are 3 steps, not the 4 that 3.0000000000000004 rounds up to
    return max(1, ceil(round(epochs * stream.steps_per_epoch, 9)))


def batch_facts(recipe: Recipe, stream: Stream, world_size: int) -> dict[str, Any]:
    micro_steps = [len(stream.cells(step, world_size)) for step in range(min(4, stream.steps_per_epoch))]
    return {
        "global_batch_size": recipe.training.global_batch_size,
        "gradient_accumulation_steps": max(micro_steps),
        "steps_per_epoch": stream.steps_per_epoch,
    }
