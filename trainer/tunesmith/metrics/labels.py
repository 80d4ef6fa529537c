"""Metrics of classification, with one label per row or several. Values agree with scikit-learn's for
`zero_division=0`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ClassIds = Sequence[int] | NDArray[np.integer[Any]]
Indicators = Sequence[Sequence[int]] | NDArray[np.integer[Any]] | NDArray[np.bool_]
Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class, label or entity type. `support` counts it in the references, `predicted` in the
    predictions."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    predicted: int


@dataclass(frozen=True, slots=True, eq=False)
class LabelTable:
    """Scores of every class, in the order of the names, and the confusion matrix: int64 [classes, classes],
    rows are references, columns predictions."""

    classes: tuple[ClassScore, ...]
    confusion: Counts


def precision_recall_f1(hits: Counts, predicted: Counts, support: Counts) -> tuple[Floats, Floats, Floats]:
    """Precision, recall and F1 per class from counts [classes]; 0.0 where the denominator is 0: precision of
    a class never predicted, recall of one that never occurs, F1 of one that does neither."""
    return _ratio(hits, predicted), _ratio(hits, support), _ratio(2 * hits, predicted + support)


def class_scores(
    names: Sequence[str], hits: Counts, predicted: Counts, support: Counts
) -> tuple[ClassScore, ...]:
    """The rows of a table from counts [classes]."""
    precision, recall, f1 = precision_recall_f1(hits, predicted, support)
    return tuple(
        ClassScore(
            name, float(precision[i]), float(recall[i]), float(f1[i]), int(support[i]), int(predicted[i])
        )
        for i, name in enumerate(names)
    )


def _ratio(numerator: Counts, denominator: Counts) -> Floats:
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator != 0)


def single_label_metrics(predictions: ClassIds, references: ClassIds) -> dict[str, float]:
    """`accuracy`, `macro_f1`, `micro_f1`, `weighted_f1`, `macro_precision`, `macro_recall`,
    `balanced_accuracy`, `mcc`.

    `predictions`, `references`: class ids ≥ 0, [rows]. Macro averages run over the classes that occur in the
    references or the predictions, weighted ones by the references' counts (both scikit-learn's default);
    `balanced_accuracy` is the mean recall of those in the references.
    `micro_f1` equals `accuracy`, as every row has one label. `mcc` is Gorodkin's R_K (2004, Comput. Biol.
    Chem. 28), 0.0 where the references or the predictions are all of one class. No rows: all nan."""
    matrix = _confusion(predictions, references)
    rows = int(matrix.sum())
    if rows == 0:
        return dict.fromkeys(_SINGLE, math.nan)
    hits, predicted, support = np.diagonal(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
    occurs = (predicted + support) > 0
    precision, recall, f1 = precision_recall_f1(hits[occurs], predicted[occurs], support[occurs])
    accuracy = int(hits.sum()) / rows
    return {
        "accuracy": accuracy,
        "macro_f1": float(f1.mean()),
        "micro_f1": accuracy,
        "weighted_f1": float(f1 @ support[occurs]) / rows,
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "balanced_accuracy": float(_ratio(hits, support)[support > 0].mean()),
        "mcc": _mcc(hits, predicted, support),
    }


_SINGLE = (
    "accuracy",
    "macro_f1",
    "micro_f1",
    "weighted_f1",
    "macro_precision",
    "macro_recall",
    "balanced_accuracy",
    "mcc",
)


def single_label_table(predictions: ClassIds, references: ClassIds, names: Sequence[str]) -> LabelTable:
    """Every class of `names` (class id i is names[i]), those that never occur included, with 0.0 and support
    0."""
    matrix = _confusion(predictions, references, len(names))
    hits, predicted, support = np.diagonal(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
    return LabelTable(class_scores(names, hits, predicted, support), matrix)


def majority_baseline_accuracy(
    train_labels: Sequence[str] | ClassIds, references: Sequence[str] | ClassIds
) -> float:
    """The accuracy on `references` of always answering the most frequent of `train_labels` (both ids or both
    names, [rows]); of equally frequent ones the smallest. nan where either is empty."""
    train, given = np.asarray(train_labels), np.asarray(references)
    if train.size == 0 or given.size == 0:
        return math.nan
    assert (train.dtype.kind in "iu") == (given.dtype.kind in "iu"), "class ids and names do not compare"
    values, counts = np.unique(train, return_counts=True)
    return float(np.mean(given == values[counts.argmax()]))


def _confusion(predictions: ClassIds, references: ClassIds, classes: int | None = None) -> Counts:
    predicted, given = _class_ids(predictions), _class_ids(references)
    assert len(predicted) == len(given), f"{len(predicted)} predictions for {len(given)} references"
    largest = max(predicted.max(initial=-1), given.max(initial=-1))
    classes = int(largest) + 1 if classes is None else classes
    assert largest < classes, f"class id {largest}, but only {classes} classes"
    return np.bincount(given * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def _class_ids(ids: ClassIds) -> Counts:
    array = np.asarray(ids)
    assert array.ndim == 1, f"class ids are [rows], not {array.shape}"
    assert array.size == 0 or array.dtype.kind in "iu", f"class ids are integers, not {array.dtype}"
    assert array.min(initial=0) >= 0, "class ids are not negative: leave ignored rows out"
    return array.astype(np.int64)


def _mcc(hits: Counts, predicted: Counts, support: Counts) -> float:
    # python integers: the products of four counts overflow int64 from about 50,000 rows on
    correct, rows = int(hits.sum()), int(support.sum())
    chance = int(predicted @ support)
    spread = (rows * rows - int(predicted @ predicted)) * (rows * rows - int(support @ support))
    return (correct * rows - chance) / math.sqrt(spread) if spread else 0.0


def multi_label_metrics(predictions: Indicators, references: Indicators) -> dict[str, float]:
    """`micro_f1`, `macro_f1`, `micro_precision`, `micro_recall`, `macro_precision`, `macro_recall`,
    `balanced_accuracy`, `mcc`, `subset_accuracy` (rows with every label right), `hamming_loss` (share of wrong cells,
    lower is better). `balanced_accuracy` (the mean of a label's recall and its absence's) and `mcc` are means over the
    labels that some rows have and others do not, nan where there is none.

    `predictions`, `references`: 0/1 or bool, [rows, labels]. Macro averages run over all labels, also those
    that never occur (0.0), as in scikit-learn; micro scores are 0.0 where no label is set. No rows: all
    nan."""
    predicted, given = _indicators(predictions, references)
    if len(given) == 0:
        return dict.fromkeys(_MULTI, math.nan)
    hits, predicted_counts, support = _label_counts(predicted, given)
    precision, recall, f1 = precision_recall_f1(hits, predicted_counts, support)
    micro = precision_recall_f1(*(counts.sum(keepdims=True) for counts in (hits, predicted_counts, support)))
    without = len(given) - support
    told_apart = (support > 0) & (without > 0)
    absent_hits = without - (predicted_counts - hits)
    balanced = (_ratio(hits, support) + _ratio(absent_hits, without)) / 2
    return {
        "micro_f1": float(micro[2][0]),
        "macro_f1": float(f1.mean()),
        "micro_precision": float(micro[0][0]),
        "micro_recall": float(micro[1][0]),
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "balanced_accuracy": float(balanced[told_apart].mean()) if told_apart.any() else math.nan,
        "mcc": _mean_mcc(hits, predicted_counts, support, len(given), told_apart),
        "subset_accuracy": float(np.mean((predicted == given).all(axis=1))),
        "hamming_loss": float(np.mean(predicted != given)),
    }


def _mean_mcc(
    hits: Counts, predicted: Counts, support: Counts, rows: int, told_apart: NDArray[np.bool_]
) -> float:
    found = [
        _mcc(
            np.array([hits[i], rows - predicted[i] - support[i] + hits[i]]),
            np.array([predicted[i], rows - predicted[i]]),
            np.array([support[i], rows - support[i]]),
        )
        for i in np.flatnonzero(told_apart)
    ]
    return sum(found) / len(found) if found else math.nan


_MULTI = (
    "micro_f1",
    "macro_f1",
    "micro_precision",
    "micro_recall",
    "macro_precision",
    "macro_recall",
    "balanced_accuracy",
    "mcc",
    "subset_accuracy",
    "hamming_loss",
)


def multi_label_table(
    predictions: Indicators, references: Indicators, names: Sequence[str]
) -> tuple[ClassScore, ...]:
    """Every label of `names`, in their order (column i is names[i])."""
    predicted, given = _indicators(predictions, references)
    if len(given) == 0:
        predicted = given = np.zeros((0, len(names)), dtype=np.bool_)
    assert given.shape[1] == len(names), f"{given.shape[1]} columns for {len(names)} names"
    return class_scores(names, *_label_counts(predicted, given))


def _label_counts(predicted: NDArray[np.bool_], given: NDArray[np.bool_]) -> tuple[Counts, Counts, Counts]:
    return (predicted & given).sum(axis=0), predicted.sum(axis=0), given.sum(axis=0)


def _indicators(
    predictions: Indicators, references: Indicators
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    predicted, given = np.asarray(predictions), np.asarray(references)
    assert predicted.shape == given.shape, f"predictions {predicted.shape}, references {given.shape}"
    if len(given):
        assert given.ndim == 2, f"indicators are [rows, labels], not {given.shape}"
        assert given.size, "rows, but no labels"
        for array in (predicted, given):
            assert np.isin(array, (0, 1)).all(), "indicators are 0 or 1: apply the threshold first"
    return predicted.astype(np.bool_), given.astype(np.bool_)
