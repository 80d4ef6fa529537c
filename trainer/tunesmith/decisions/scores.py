"""The metrics and tables of answers with labels: by the decisions, and beside them without, where that differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.decisions import UNDECIDED, Decisions, Floats
from tunesmith.metrics import calibration, labels, ranking

UNTUNED = "_untuned"
"""The ending of a metric's name where it is that of the answers without decisions."""
MOST_CURVES = 8

Found = tuple[dict[str, float], dict[str, Any]]


def rarer(counts: Mapping[str, int], names: Sequence[str]) -> int:
    """Which of two labels is looked for: the rarer one of the training rows, the second of equally frequent ones."""
    first, second = (counts.get(name, 0) for name in names)
    return 0 if first < second else 1


def single_label_scores(
    probabilities: NDArray[Any],
    truth: NDArray[np.int64],
    names: Sequence[str],
    counts: Mapping[str, int],
    decisions: Decisions,
) -> Found:
    """(metrics, tables) of rows with one label. Of two labels `pr_auc` is that of the rarer training label, of more
    the mean over the labels. `probabilities`: [rows, labels], as the model gives them; `truth`: [rows]."""

    def metrics(by: Decisions) -> tuple[dict[str, float], dict[str, float]]:
        p = by.calibrated(probabilities, exclusive=True)
        of_scores = _ranked(p) | calibration.single_label_calibration(p, truth)
        return labels.single_label_metrics(by.one_label(p), truth), of_scores

    def _ranked(p: Floats) -> dict[str, float]:
        one_hot = np.eye(len(names), dtype=np.bool_)[truth]
        if len(names) > 2:
            return ranking.curve_areas(p, one_hot)
        looked_for = [rarer(counts, names)]
        return ranking.curve_areas(p[:, looked_for], one_hot[:, looked_for])

    p = decisions.calibrated(probabilities, exclusive=True)
    one_hot = np.eye(len(names), dtype=np.bool_)[truth]
    shown = [rarer(counts, names)] if len(names) == 2 else range(len(names))
    tables: dict[str, Any] = {
        "labels": labels.single_label_table(decisions.one_label(p), truth, names),
        "precision_recall": _curves(p, one_hot, names, shown),
        "reliability": {"bins": calibration.single_label_reliability(p, truth)},
    }
    if decisions.temperature is not None:
        before = calibration.single_label_reliability(probabilities, truth)
        tables["reliability"] |= {"before": before, "temperature": decisions.temperature}
    return _both(metrics, decisions), tables


def multi_label_scores(
    probabilities: NDArray[Any], truth: NDArray[np.int64], names: Sequence[str], decisions: Decisions
) -> Found:
    """(metrics, tables) of rows with several labels. `probabilities`, `truth`: [rows, labels]."""

    def metrics(by: Decisions) -> tuple[dict[str, float], dict[str, float]]:
        p = by.calibrated(probabilities, exclusive=False)
        areas = ranking.curve_areas(p, truth.astype(np.bool_))
        of_scores = areas | calibration.multi_label_calibration(p, truth)
        return labels.multi_label_metrics(by.many_labels(p), truth), of_scores

    p = decisions.calibrated(probabilities, exclusive=False)
    tables: dict[str, Any] = {
        "labels": labels.multi_label_table(decisions.many_labels(p), truth, names),
        "precision_recall": _curves(p, truth.astype(np.bool_), names, range(len(names))),
        "reliability": {"bins": calibration.multi_label_reliability(p, truth)},
    }
    if decisions.temperature is not None:
        before = calibration.multi_label_reliability(probabilities, truth)
        tables["reliability"] |= {"before": before, "temperature": decisions.temperature}
    return _both(metrics, decisions), tables


def _both(
    metrics: Callable[[Decisions], tuple[dict[str, float], dict[str, float]]], decisions: Decisions
) -> dict[str, float]:
    """The metrics by the decisions; those of answers also without where answers were decided on, those of scores
    where the scores have a temperature."""
    of_answers, of_scores = metrics(decisions)
    if decisions == UNDECIDED:
        return of_answers | of_scores
    plain_answers, plain_scores = metrics(UNDECIDED)
    plain = (plain_answers if decisions.chooses else {}) | (
        plain_scores if decisions.temperature is not None else {}
    )
    return of_answers | of_scores | {f"{name}{UNTUNED}": value for name, value in plain.items()}


def _curves(
    p: Floats, truth: NDArray[np.bool_], names: Sequence[str], shown: Sequence[int]
) -> list[dict[str, Any]]:
    """The curves of the labels with the smallest area, which have something to show, at most MOST_CURVES."""
    areas = [(ranking.average_precision(p[:, i], truth[:, i]), i) for i in shown if truth[:, i].any()]
    return [
        {"name": names[i], "area": area, "share": float(truth[:, i].mean())}
        | ranking.precision_recall_curve(p[:, i], truth[:, i])
        for area, i in sorted(areas)[:MOST_CURVES]
    ]
