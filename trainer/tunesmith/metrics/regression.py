"""Metrics of predicted numbers. Values agree with scikit-learn's and scipy's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = Sequence[float] | Sequence[Sequence[float]] | NDArray[np.floating[Any]]
Floats = NDArray[np.float64]

_NAMES = ("mse", "rmse", "mae", "pearson", "spearman", "r2")


def regression_metrics(predictions: Numbers, references: Numbers) -> dict[str, float]:
    """`mse`, `rmse`, `mae`, `pearson`, `spearman` (Pearson's on average ranks), `r2`.

    `predictions`, `references`: [rows] or [rows, targets], computed in float64. With several targets each
    measure is the mean of the targets' own (scikit-learn's `uniform_average`, so `rmse` is the mean of
    roots). Undefined, as in scikit-learn and scipy: correlations are nan where either side is constant; `r2`
    on constant references is 1.0 if the predictions are exact, else 0.0; correlations and `r2` are nan below
    two rows. No rows, or a number that is not finite: all nan."""
    predicted, given = _columns(predictions), _columns(references)
    assert predicted.shape == given.shape, f"predictions {predicted.shape}, references {given.shape}"
    if given.size == 0 or not (np.isfinite(predicted).all() and np.isfinite(given).all()):
        return dict.fromkeys(_NAMES, math.nan)
    # finite numbers beyond 1e154 have squares beyond float64: inf or nan is then the answer
    with np.errstate(over="ignore", invalid="ignore"):
        targets = [_one_target(x, y) for x, y in zip(predicted.T, given.T, strict=True)]
        return {name: float(np.mean([target[name] for target in targets])) for name in _NAMES}


def _columns(numbers: Numbers) -> Floats:
    array = np.asarray(numbers, dtype=np.float64)
    assert array.ndim in (1, 2), f"numbers are [rows] or [rows, targets], not {array.shape}"
    return array[:, None] if array.ndim == 1 else array


def _one_target(predicted: Floats, given: Floats) -> dict[str, float]:
    error = predicted - given
    mse = float(np.mean(error**2))
    return {
        "mse": mse,
        "rmse": math.sqrt(mse),
        "mae": float(np.mean(np.abs(error))),
        "pearson": _pearson(predicted, given),
        "spearman": _pearson(_average_ranks(predicted), _average_ranks(given)),
        "r2": _r2(error, given),
    }


def _r2(error: Floats, given: Floats) -> float:
    if len(given) < 2:
        return math.nan
    residual = float(np.sum(error**2))
    # compared with its first number, as the mean of equal numbers may differ from them by a rounding
    total = float(np.sum((given - given.mean()) ** 2)) if (given != given[0]).any() else 0.0
    if total == 0.0:
        return 1.0 if residual == 0.0 else 0.0
    return 1.0 - residual / total


def _pearson(x: Floats, y: Floats) -> float:
    if (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    # scaled before squaring, so that neither tiny nor huge numbers leave float64's range
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip((x @ y) / (np.linalg.norm(x) * np.linalg.norm(y)), -1.0, 1.0))


def _average_ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share the mean of the ranks that they take."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2)[group]
