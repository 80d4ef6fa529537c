"""How well scores put the rows of a label before the others: areas under curves, which need no threshold. Values agree
with scikit-learn's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Scores = NDArray[np.floating[Any]]
Truth = NDArray[np.bool_]


def thresholds_of(scores: Scores, truth: Truth) -> tuple[Floats, Floats, Floats]:
    """(distinct scores, hits, false alarms), each [distinct], from the highest score down: how many rows that carry the
    label, and how many that do not, have at least that score. `scores`, `truth`: [rows]."""
    order = np.argsort(-scores.astype(np.float64), kind="stable")
    ordered = scores[order].astype(np.float64)
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) if len(ordered) else np.empty(0, int)
    hits = np.cumsum(truth[order])[last].astype(np.float64)
    return ordered[last], hits, last + 1.0 - hits


def average_precision(scores: Scores, truth: Truth) -> float:
    """The area under the precision-recall curve as Σ (R_n − R_{n−1}) P_n over the distinct scores, without
    interpolation (Manning et al. 2008, §8.4). nan where no row carries the label."""
    _, hits, alarms = thresholds_of(scores, truth)
    if not truth.any():
        return math.nan
    return float(np.diff(hits, prepend=0.0) @ (hits / (hits + alarms)) / hits[-1])


def roc_auc(scores: Scores, truth: Truth) -> float:
    """The chance that a row with the label has a higher score than one without, ties counting half (Hanley & McNeil
    1982): the area under the ROC curve. nan where all rows or none carry the label."""
    _, hits, alarms = thresholds_of(scores, truth)
    if not truth.any() or truth.all():
        return math.nan
    hits, alarms = np.append(0.0, hits), np.append(0.0, alarms)
    return float(np.diff(alarms) @ (hits[1:] + hits[:-1]) / 2 / (hits[-1] * alarms[-1]))


def curve_areas(scores: Scores, truth: Truth) -> dict[str, float]:
    """`pr_auc` and `roc_auc`: the means over the labels for which they are defined; nan where there is none.
    `scores`, `truth`: [rows, labels]."""
    areas = [(average_precision(s, t), roc_auc(s, t)) for s, t in zip(scores.T, truth.T, strict=True)]
    return {name: _mean([pair[i] for pair in areas]) for i, name in enumerate(("pr_auc", "roc_auc"))}


def _mean(values: list[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def precision_recall_curve(scores: Scores, truth: Truth, most: int = 100) -> dict[str, list[float]]:
    """`recall`, `precision` and `score` (the least that a row has) from few rows to all: at most `most` points, evenly
    spread in recall, for a picture. Empty where no row carries the label."""
    values, hits, alarms = thresholds_of(scores, truth)
    if not truth.any():
        return {"recall": [], "precision": [], "score": []}
    recall, precision = hits / hits[-1], hits / (hits + alarms)
    places = np.unique(np.searchsorted(recall, np.linspace(recall[0], 1.0, most)))
    return {
        "recall": recall[places].tolist(),
        "precision": precision[places].tolist(),
        "score": values[places].tolist(),
    }
