"""How far probabilities can be believed: log loss, Brier score, expected calibration error. Values agree with
scikit-learn's where it has them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Probabilities = NDArray[np.floating[Any]]
BINS = 15  # Guo et al. 2017
_LEAST = float(np.finfo(np.float64).eps)  # below it a probability counts as this much, as in scikit-learn


def single_label_calibration(probabilities: Probabilities, references: NDArray[np.int64]) -> dict[str, float]:
    """`log_loss`: mean of −log p(reference); `brier` (Brier 1950): mean of Σ_labels (p − [it is the reference])², with
    two labels half of it, which is (p − y)²; `ece`: see `reliability`, of the most probable label.
    `probabilities`: [rows, labels], rows sum to 1; `references`: [rows]."""
    p = probabilities.astype(np.float64)
    given = p[np.arange(len(p)), references]
    truth = np.zeros_like(p)
    truth[np.arange(len(p)), references] = 1.0
    square = float(((p - truth) ** 2).sum(axis=1).mean())
    return {
        "log_loss": float(-np.log(given.clip(_LEAST, 1.0)).mean()),
        "brier": square / 2 if p.shape[1] == 2 else square,
        "ece": ece(single_label_reliability(p, references)),
    }


def multi_label_calibration(probabilities: Probabilities, references: NDArray[Any]) -> dict[str, float]:
    """`log_loss`, `brier` and `ece` of every row's every label, whether the row has it. `references`: 0/1, both
    [rows, labels]."""
    p, y = probabilities.astype(np.float64), references.astype(np.float64)
    bounded = p.clip(_LEAST, 1.0 - _LEAST)
    return {
        "log_loss": float(-(y * np.log(bounded) + (1.0 - y) * np.log1p(-bounded)).mean()),
        "brier": float(((p - y) ** 2).mean()),
        "ece": ece(multi_label_reliability(p, references)),
    }


def single_label_reliability(
    probabilities: Probabilities, references: NDArray[np.int64]
) -> list[dict[str, float]]:
    """`reliability` of the most probable label."""
    best = probabilities.argmax(axis=1)
    return reliability(probabilities[np.arange(len(best)), best], best == references)


def multi_label_reliability(probabilities: Probabilities, references: NDArray[Any]) -> list[dict[str, float]]:
    """`reliability` of every label of every row."""
    return reliability(probabilities.ravel(), references.astype(np.bool_).ravel())


def reliability(
    probabilities: Probabilities, truth: NDArray[np.bool_], bins: int = BINS
) -> list[dict[str, float]]:
    """The rows in `bins` bins of equal width (low, high] of their probability: of each bin that has rows their number
    (`count`), mean probability (`confidence`) and share of true ones (`accuracy`)."""
    p = probabilities.astype(np.float64)
    places = np.clip(np.ceil(p * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(places, minlength=bins)
    confidence, accuracy = np.bincount(places, p, bins), np.bincount(places, truth, bins)
    return [
        {
            "low": i / bins,
            "high": (i + 1) / bins,
            "count": int(counts[i]),
            "confidence": float(confidence[i] / counts[i]),
            "accuracy": float(accuracy[i] / counts[i]),
        }
        for i in np.flatnonzero(counts).tolist()
    ]


def ece(bins: list[dict[str, float]]) -> float:
    """Expected calibration error (Naeini et al. 2015): Σ_bins (count / rows) · |accuracy − confidence|."""
    rows = sum(one["count"] for one in bins)
    return sum(one["count"] / rows * abs(one["accuracy"] - one["confidence"]) for one in bins)
