"""From the recipe's `data` to the order of the rows: what is drawn in an epoch, and what comes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.curriculum import EasyFirst, Limits, Pace
from tunesmith.data.order import Order
from tunesmith.data.prepare import Dataset
from tunesmith.data.rows import read_rows
from tunesmith.data.sampling import row_labels, sampled
from tunesmith.errors import DataError, UserError
from tunesmith.objectives import Objective
from tunesmith.recipe.curriculum import ByColumn, ByLength, ByLoss
from tunesmith.recipe.data import Data
from tunesmith.recipe.moments import step_of


def build_order(
    data: Data, dataset: Dataset, objective: Objective, window_rows: int, seed: int
) -> tuple[Order, dict[str, Any]]:
    """The order without a curriculum, and facts for the start-up report."""
    segments, facts = dataset.segments, {}
    if data.sampling is not None:
        segments, drawn = sampled(data.sampling, dataset.segments, row_labels(objective, dataset.table))
        facts = {"sampling": drawn}
    lengths = dataset.table.lengths() if data.group_by_length and not data.packing else None
    order = Order(segments, window_rows, seed, data.shuffle, lengths)
    if order.rows_per_epoch == 0:
        raise UserError("data.train: the weights of the sources leave no row in an epoch")
    return order, facts


def with_curriculum(
    order: Order, data: Data, dataset: Dataset, objective: Objective, total_steps: Callable[[], int]
) -> tuple[Order, Limits | None]:
    """The order with what the recipe wants first. Paths of `data` are absolute. Raises UserError where it asks for
    what the rows or the steps do not give."""
    if data.curriculum is None and data.max_length_schedule is None:
        return order, None
    steps, per_epoch = total_steps(), order.steps_per_epoch
    lengths, limits, pace = dataset.table.lengths(), None, None
    difficulty = np.zeros(len(dataset))
    if (schedule := data.max_length_schedule) is not None:
        stages = tuple((step_of(one.until, steps, per_epoch), one.max_length) for one in schedule.stages)
        limits = Limits(stages, data.max_length, schedule.longer == "cut")
        _check_limits(limits, lengths, min(order.window_rows, order.rows_per_epoch), steps)
    if (curriculum := data.curriculum) is not None:
        pace = Pace(curriculum.pace, step_of(curriculum.pace.until, steps, per_epoch))
        if pace.until > steps:
            raise UserError(
                f"data.curriculum.pace.until: step {pace.until} is behind the last, {steps}: some rows would never come"
            )
        difficulty = _difficulty(curriculum, data, dataset, objective)
        if curriculum.direction == "hard_first":
            difficulty = -difficulty
    return replace(order, selection=EasyFirst(difficulty, pace, lengths, limits)), limits


def _check_limits(limits: Limits, lengths: NDArray[np.int64], window_rows: int, total_steps: int) -> None:
    key = "data.max_length_schedule"
    for (before, _), (until, _) in pairwise(limits.stages):
        if before >= until:
            raise UserError(f"{key}: a stage until step {until} comes behind one until step {before}")
    if limits.ends > total_steps:
        raise UserError(f"{key}: the last stage ends at step {limits.ends}, behind the last, {total_steps}")
    for _, tokens in limits.stages:
        if not limits.cut and (fitting := int((lengths <= tokens).sum())) < window_rows:
            raise UserError(
                f"{key}: {fitting} rows have at most {tokens} tokens, fewer than a step's {window_rows}: "
                "raise the stage's max_length"
            )


def _difficulty(
    curriculum: ByLength | ByColumn | ByLoss, data: Data, dataset: Dataset, objective: Objective
) -> NDArray[np.float64]:
    """fp64 [rows]: small is easy."""
    match curriculum:
        case ByLength():
            return dataset.table.lengths().astype(np.float64)
        case ByColumn():
            return _column(curriculum.column, data, dataset)
        case ByLoss():
            from tunesmith.data.reference_loss import reference_losses

            return reference_losses(Path(curriculum.reference), data, dataset, objective)


def _column(column: str, data: Data, dataset: Dataset) -> NDArray[np.float64]:
    scores: dict[tuple[str, int], float] = {}
    for source in data.train:
        for row in read_rows(source, Path()):
            if column not in row.values:
                raise DataError(f"data.curriculum.column: there is no column {column!r}", row.place)
            try:
                score = float(row.values[column])
            except (TypeError, ValueError):
                raise DataError(f"{row.values[column]!r} is not a number", row.place, column) from None
            if not np.isfinite(score):
                raise DataError(f"{row.values[column]!r} is not a finite number", row.place, column)
            scores[row.place.file, row.place.line] = score
    places = (dataset.place(row) for row in range(len(dataset)))
    return np.array([scores[place.file, place.line] for place in places])
