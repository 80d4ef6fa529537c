"""An evaluation: the loss over all rows, the objective's metrics on what all ranks predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.order import Salt, deal
from tunesmith.data.prepare import Dataset
from tunesmith.engine import Engine
from tunesmith.errors import UserError
from tunesmith.module import Predicted
from tunesmith.objectives import Objective
from tunesmith.objectives.base import Scores
from tunesmith.tasks.datasets import TaskDataset
from tunesmith.tasks.objective import MEAN, TaskObjective

EVALUATION_EPOCH = 2**31 - 1  # what a row is drawn with here: every evaluation sees the same masks


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`loss` is Σ over the terms of weight × (sum / units), as in training. `metrics` has it too."""

    loss: float
    metrics: dict[str, float]
    tables: dict[str, Any]


def predict_rows(
    engine: Engine, objective: Objective, dataset: Dataset, rows: Sequence[int], per_device: int, seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Tensor, Tensor, list[Any]]:  # fmt: skip
    """(sums [terms], units [terms], one prediction per row in the order of `rows`, on every rank). The rows are
    dealt over the ranks; every rank runs equally many forwards."""
    lengths = dataset.table.lengths()[np.asarray(rows, dtype=np.int64)]
    ordered = [rows[i] for i in np.argsort(-lengths, kind="stable")]
    sums = torch.zeros(len(objective.terms), dtype=torch.float64, device=engine.device)
    units = torch.zeros_like(sums)
    found: list[tuple[int, Any]] = []
    window = engine.data_size * per_device
    engine.module.eval()
    with torch.no_grad():
        for start in range(0, len(ordered), window):
            (cells,) = deal(ordered[start : start + window], engine.data_size, per_device)
            cell = cells[engine.data_rank] or ordered[:1]
            drawn = [
                objective.draw(dataset.table.row(row), (seed, EVALUATION_EPOCH, row, Salt.ROW))
                for row in cell
            ]
            batch = replace(objective.collate(drawn, cell), task=objective.task)
            if not cells[engine.data_rank]:
                batch = batch.as_filler()
            batch = engine.part(batch)
            result: Predicted = engine.forward(batch, "predict")
            sums += result.sums
            units += torch.tensor([term.units(batch) for term in objective.terms], device=engine.device)
            found += [(r, p) for r, p in zip(batch.rows, result.predictions, strict=False) if r >= 0]
            progress(len(ordered[start : start + window]))
    engine.module.train()
    by_row = {row: p for part in engine.gather(found) for row, p in part}
    return engine.sum(sums), engine.sum(units), [by_row[row] for row in rows if row in by_row]


def evaluate(
    engine: Engine, objective: Objective, dataset: Dataset, per_device: int, seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Evaluation:  # fmt: skip
    """Loss and metrics over a whole split; the same on every rank. Of several tasks the metrics have the task's name
    before theirs, and the loss is the sum that is trained."""
    if isinstance(objective, TaskObjective) and isinstance(dataset, TaskDataset):
        return _of_tasks(
            objective,
            {
                name: evaluate(engine, objective.of(name), own, per_device, seed, progress)
                for name, own in dataset.parts.items()
            },
        )
    rows = range(len(dataset))
    sums, units, predictions = predict_rows(engine, objective, dataset, rows, per_device, seed, progress)
    weights = torch.tensor(
        [term.weight for term in objective.terms], dtype=torch.float64, device=engine.device
    )
    parts = sums / units.clamp(min=1)
    loss = float((weights * parts).sum())
    scores: Scores = engine.broadcast(
        objective.score(dataset.table, rows, predictions) if engine.rank == 0 and predictions else Scores({})
    )
    metrics = {"loss": loss} | objective.loss_metrics(loss) | scores.metrics
    if len(objective.terms) > 1:
        metrics |= {
            f"{term.name}_loss": float(part) for term, part in zip(objective.terms, parts, strict=True)
        }
    return Evaluation(loss, metrics, scores.tables)


def _of_tasks(objective: TaskObjective, found: Mapping[str, Evaluation]) -> Evaluation:
    """The evaluations of all tasks as one: TASK_METRIC, and the mean of what tells how good each is."""
    loss = sum(objective.parts[name].weight * own.loss for name, own in found.items())
    metrics: dict[str, float] = {"loss": loss}
    best: list[float] = []
    for name, own in found.items():
        part = objective.parts[name]
        chosen = part.evaluation.metrics
        for asked in (*(chosen or ()), part.metric[0]):
            if asked not in own.metrics:
                raise UserError(
                    f"tasks.{name}.evaluation: {asked} is not among its objective's metrics: {', '.join(own.metrics)}"
                )
        kept = (
            own.metrics if chosen is None else {"loss": own.loss, **{key: own.metrics[key] for key in chosen}}
        )
        metrics |= {f"{name}_{key}": value for key, value in kept.items()}
        best += [own.metrics[part.metric[0]]] if part.trained else []
    if best and objective.default_metric[0] == MEAN:
        metrics[MEAN] = sum(best) / len(best)
    tables = {f"{name} {key}": table for name, own in found.items() for key, table in own.tables.items()}
    return Evaluation(loss, metrics, tables)
