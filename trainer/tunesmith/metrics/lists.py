"""How good the order of a list is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np


def list_metrics(scores: Sequence[Any], relevance: Sequence[Any]) -> dict[str, float]:
    """`ndcg` over whole lists and `ndcg_at_10` (Järvelin & Kekäläinen 2002; the gain is the relevance, raised by the
    list's lowest where that is below 0; the discount is log2 of rank + 1; texts of equal score share the mean of their
    gains), `pair_accuracy` (pairs of different relevance in their order, equal scores half), `mrr` (1 / rank of the
    first text of the list's highest relevance): means over lists, each [texts]. nan for no lists."""
    if not len(scores):
        return dict.fromkeys(("ndcg", "ndcg_at_10", "pair_accuracy", "mrr"), math.nan)
    lists = zip(scores, relevance, strict=True)
    found = [_of_list(np.asarray(s, np.float64), np.asarray(r, np.float64)) for s, r in lists]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def _of_list(scores: Any, relevance: Any) -> dict[str, float]:
    order = np.argsort(-scores, kind="stable")
    gain = relevance - min(0.0, float(relevance.min()))
    higher = relevance[:, None] > relevance[None, :]
    ahead = (scores[:, None] > scores[None, :]) + 0.5 * (scores[:, None] == scores[None, :])
    first = int(np.argmax(relevance[order] == relevance.max()))
    return {
        "ndcg": _ndcg(scores, gain, len(gain)),
        "ndcg_at_10": _ndcg(scores, gain, 10),
        "pair_accuracy": float(ahead[higher].mean()) if higher.any() else math.nan,
        "mrr": 1.0 / (first + 1),
    }


def _ndcg(scores: Any, gain: Any, top: int) -> float:
    discount = 1.0 / np.log2(np.arange(len(gain)) + 2.0)
    discount[top:] = 0.0
    _, group, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    mean_gain = np.bincount(group, weights=gain) / counts
    edges = np.concatenate([[0], np.cumsum(counts)])
    shares = np.array([discount[a:b].sum() for a, b in pairwise(edges)])
    best = float((np.sort(gain)[::-1] * discount).sum())
    return float(mean_gain @ shares) / best if best > 0 else math.nan
