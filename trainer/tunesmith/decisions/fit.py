"""Decisions made: after training, by the weights of `final/`, on the evaluation rows alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.prepare import Dataset
from tunesmith.decisions import UNDECIDED, Decisions, Floats, log_odds
from tunesmith.decisions.scores import rarer
from tunesmith.decisions.temperature import fit_temperature
from tunesmith.decisions.thresholds import best_offsets, best_threshold
from tunesmith.engine import Engine
from tunesmith.errors import UserError
from tunesmith.evaluator import predict_rows
from tunesmith.objectives import Objective
from tunesmith.objectives.classification import ClassificationObjective
from tunesmith.recipe.evaluation import Evaluation
from tunesmith.tracking.report import DECIDED, plain

_OF_MANY = ("macro_f1", "balanced_accuracy", "accuracy")


@dataclass(frozen=True, slots=True)
class Decided:
    """What was decided, in words for the log, and what it changed on the rows that it was fitted on (which it flatters:
    the test rows say what it is worth)."""

    decisions: Decisions
    told: tuple[str, ...]
    metrics: dict[str, float]
    tables: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        return {"decided": self.decisions.state(), "told": list(self.told), "eval": self.metrics}


def check(settings: Evaluation, objective: Objective) -> None:
    """Raises UserError, before the training, where the labels are not what the settings are for."""
    for key in ("tune_thresholds", "calibrate"):
        if getattr(settings, key) is not None and (
            not isinstance(objective, ClassificationObjective) or objective.problem == "regression"
        ):
            raise UserError(f"evaluation.{key}: is for labels, which these rows do not have")
    tuning = settings.tune_thresholds
    if tuning is not None and isinstance(objective, ClassificationObjective):
        many = objective.problem == "single_label" and len(objective.labels) > 2
        if many and tuning.metric not in _OF_MANY:
            raise UserError(
                f"evaluation.tune_thresholds.metric: {tuning.metric} is of two labels; for "
                f"{len(objective.labels)} write one of {', '.join(_OF_MANY)}"
            )


def decide(
    engine: Engine, objective: Objective, dataset: Dataset, settings: Evaluation, seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Decided:  # fmt: skip
    """Fits what the settings ask for and gives it to the objective; the same on every rank."""
    assert isinstance(objective, ClassificationObjective)
    objective.decisions = UNDECIDED
    rows = range(len(dataset))
    per_device = settings.per_device_eval_batch_size
    _, _, predictions = predict_rows(engine, objective, dataset, rows, per_device, seed, progress)
    decisions, told = engine.broadcast(
        _fit(objective, dataset, predictions, settings) if engine.rank == 0 else (UNDECIDED, ())
    )
    objective.decisions = decisions
    scores = objective.score(dataset.table, rows, predictions)
    return Decided(decisions, told, scores.metrics, scores.tables)


def _fit(
    objective: ClassificationObjective, dataset: Dataset, predictions: Sequence[Any], settings: Evaluation
) -> tuple[Decisions, tuple[str, ...]]:
    exclusive = objective.problem == "single_label"
    probabilities = np.stack(predictions).astype(np.float64)
    truth = np.zeros_like(probabilities)
    for row in range(len(dataset)):
        truth[row, dataset.table.value("labels", row)] = 1.0
    decisions, told = UNDECIDED, []
    if settings.calibrate == "temperature":
        temperature = fit_temperature(
            log_odds(probabilities, exclusive=exclusive), truth, exclusive=exclusive
        )
        decisions = Decisions(temperature=temperature)
        told.append(
            "calibrate: the evaluation rows bound no temperature (all are right, or all wrong): none is set"
            if temperature is None
            else f"calibrate: temperature {temperature:.3g}"
        )
    if settings.tune_thresholds is not None:
        p = decisions.calibrated(probabilities, exclusive=exclusive)
        tuned, lines = _tune(objective, p, truth, settings.tune_thresholds.metric)
        decisions = replace(tuned, temperature=decisions.temperature)
        told += lines
    return decisions, tuple(told)


def _tune(
    objective: ClassificationObjective, p: Floats, truth: Floats, metric: str
) -> tuple[Decisions, list[str]]:
    names, given = objective.labels, truth.astype(np.bool_)
    if objective.problem == "multi_label":
        # macro F1 is the mean of the labels' own F1
        of_one = "f1" if metric == "macro_f1" else metric
        bare = [names[i] for i in range(len(names)) if not given[:, i].any()]
        thresholds = tuple(
            best_threshold(p[:, i], given[:, i], of_one) if given[:, i].any() else 0.5
            for i in range(len(names))
        )
        lines = [f"tune_thresholds: {_listed(names, thresholds)}"]
        lines += [f"tune_thresholds: no evaluation row has {', '.join(bare)}: left at 0.5"] if bare else []
        return Decisions(thresholds=thresholds, metric=metric), lines
    if len(names) > 2:
        offsets = best_offsets(log_odds(p, exclusive=True), truth.argmax(axis=1), metric)
        return Decisions(offsets=offsets, metric=metric), [
            f"tune_thresholds: log-probabilities plus {_listed(names, offsets)}"
        ]
    positive = rarer(objective.train_counts, names)
    if given[:, positive].all() or not given[:, positive].any():
        return UNDECIDED, ["tune_thresholds: the evaluation rows have one label only: nothing to tune by"]
    threshold = best_threshold(p[:, positive], given[:, positive], metric)
    return Decisions(threshold=threshold, positive=positive, metric=metric), [
        f"tune_thresholds: {names[positive]} from {threshold:.4g} on (best {metric})"
    ]


def _listed(names: Sequence[str], values: Sequence[float]) -> str:
    shown = [f"{name} {value:.3g}" for name, value in zip(names[:8], values, strict=False)]
    return ", ".join(shown) + (", …" if len(names) > 8 else "")


def write(run_dir: Path, objective: Objective, decided: Decided) -> None:
    """objective.json with the decisions, and decisions.json: what they changed, for the report."""
    state = json.dumps(objective.state(), ensure_ascii=False)
    (run_dir / "objective.json").write_text(state, encoding="utf-8")
    about = plain(decided.facts() | {"tables": decided.tables})
    (run_dir / DECIDED).write_text(
        json.dumps(about, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
