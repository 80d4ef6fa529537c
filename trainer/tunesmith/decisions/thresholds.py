"""Where probabilities become answers, chosen on evaluation rows: every threshold between two scores that occur is
tried (Lipton et al. 2014, Optimal Thresholding of Classifiers to Maximize F1 Measure)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.decisions import Floats
from tunesmith.metrics.ranking import thresholds_of

Truth = NDArray[np.bool_]
Measure = Callable[[Floats, Floats, Floats, Floats], Floats]
_PASSES = 10
_BETTER = 1e-12


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def _f1(tp: Floats, fp: Floats, fn: Floats, tn: Floats) -> Floats:
    return _ratio(2 * tp, 2 * tp + fp + fn)


def _macro_f1(tp: Floats, fp: Floats, fn: Floats, tn: Floats) -> Floats:
    return (_f1(tp, fp, fn, tn) + _f1(tn, fn, fp, tp)) / 2


def _balanced_accuracy(tp: Floats, fp: Floats, fn: Floats, tn: Floats) -> Floats:
    return (_ratio(tp, tp + fn) + _ratio(tn, tn + fp)) / 2


def _accuracy(tp: Floats, fp: Floats, fn: Floats, tn: Floats) -> Floats:
    return (tp + tn) / (tp + fp + fn + tn)


def _mcc(tp: Floats, fp: Floats, fn: Floats, tn: Floats) -> Floats:
    spread = np.sqrt(tp + fp) * np.sqrt(tp + fn) * np.sqrt(tn + fp) * np.sqrt(tn + fn)
    return _ratio(tp * tn - fp * fn, spread)


_MEASURES: Mapping[str, Measure] = {
    "f1": _f1,
    "macro_f1": _macro_f1,
    "balanced_accuracy": _balanced_accuracy,
    "accuracy": _accuracy,
    "mcc": _mcc,
}


def best_threshold(scores: Floats, truth: Truth, metric: str) -> float:
    """The threshold t for which "score > t" has the best `metric` (f1 is that of the label; macro_f1 the mean of its
    and of its absence's): in the middle between two scores that occur, and of equally good ones the nearest to 0.5.
    `scores`, `truth`: [rows], of probabilities."""
    values, hits, alarms = thresholds_of(scores, truth)
    tp, fp = np.append(0.0, hits), np.append(0.0, alarms)
    found = _MEASURES[metric](tp, fp, tp[-1] - tp, fp[-1] - fp)
    upper, lower = np.append(1.0, values), np.append(values, 0.0 if values[-1] > 0 else -1.0)
    between = lower + (upper - lower) / 2
    # between two neighbouring floating-point numbers lies none: "score > lower" then says the same
    between = np.where(between < upper, between, lower)
    best = np.flatnonzero(found >= found.max() - _BETTER)
    return float(between[best[np.argmin(np.abs(between[best] - 0.5))]])


@dataclass(frozen=True, slots=True)
class _Goal:
    """A metric as a sum over labels of what each adds to it; labels without rows add nothing. `support`: [labels]."""

    metric: str
    support: Floats
    rows: int

    def part(self, hits: Floats, predicted: Floats, support: Floats) -> Floats:
        """What a label of `support` rows adds when it is answered `predicted` times, `hits` of them rightly."""
        match self.metric:
            case "macro_f1":
                found = _ratio(2 * hits, predicted + support) / np.count_nonzero(self.support)
            case "balanced_accuracy":
                found = _ratio(hits, support) / np.count_nonzero(self.support)
            case _:
                found = hits / self.rows
        return np.where(support > 0, found, 0.0)

    def of(self, chosen: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
        return float(self.part(*_counts(chosen, truth, len(self.support)), self.support).sum())


def _counts(chosen: NDArray[np.int64], truth: NDArray[np.int64], labels: int) -> tuple[Floats, Floats]:
    """(hits, answers) of each label, [labels]."""
    hits, predicted = (
        np.bincount(truth[chosen == truth], minlength=labels),
        np.bincount(chosen, minlength=labels),
    )
    return hits.astype(np.float64), predicted.astype(np.float64)


def best_offsets(logits: Floats, truth: NDArray[np.int64], metric: str) -> tuple[float, ...]:
    """Numbers b for which argmax(logits + b) has a high `metric` (macro_f1, balanced_accuracy or accuracy): from 0
    on, one label after the other takes the best b it can have while the others keep theirs, until none gets better.
    That is a local optimum. Labels that no row has keep 0, and are left out of the mean. `logits`: [rows, labels];
    `truth`: [rows]."""
    labels = logits.shape[1]
    goal = _Goal(metric, np.bincount(truth, minlength=labels).astype(np.float64), len(truth))
    offsets, total = np.zeros(labels), goal.of(logits.argmax(axis=1), truth)
    for _ in range(_PASSES):
        before = total
        for label in np.flatnonzero(goal.support):
            offset, found = _best_offset(logits + offsets, int(label), truth, goal)
            if found > total + _BETTER:
                offsets[label] += offset
                total = found
        if total <= before + _BETTER:
            break
    return tuple(float(offset) for offset in offsets)


def _best_offset(values: Floats, label: int, truth: NDArray[np.int64], goal: _Goal) -> tuple[float, float]:
    """(what to add to the label's logit, the metric then). As it grows, rows come over from the labels that they had
    without it, one after the other; each changes the parts of two labels."""
    rows, labels = values.shape
    others = values.copy()
    others[:, label] = -np.inf
    had = others.argmax(axis=1)
    margin = others[np.arange(rows), had] - values[:, label]
    order = np.argsort(margin, kind="stable")
    margin, had, given = margin[order], had[order], truth[order]
    hits, predicted = _counts(had, given, labels)

    # how much each row takes along when it leaves: what had left its label before is counted within that label
    by_label = np.argsort(had, kind="stable")
    of = had[by_label]
    first = np.searchsorted(of, np.arange(labels))[of]
    lost = (given == had)[by_label].astype(np.float64)
    gone, gone_hits = np.arange(rows) - first, np.cumsum(lost) - lost
    gone_hits = gone_hits - gone_hits[first]
    before = goal.part(hits[of] - gone_hits, predicted[of] - gone, goal.support[of])
    after = goal.part(hits[of] - gone_hits - lost, predicted[of] - gone - 1.0, goal.support[of])
    change = np.empty(rows)
    change[by_label] = after - before

    rest = goal.part(hits, predicted, goal.support)
    own_hits = np.append(0.0, np.cumsum(given == label))
    own = goal.part(own_hits, np.arange(rows + 1.0), np.full(rows + 1, goal.support[label]))
    found = rest.sum() - rest[label] + np.append(0.0, np.cumsum(change)) + own
    # no offset stands between equal margins
    found[1:-1][margin[1:] == margin[:-1]] = -np.inf
    offsets = (np.append(margin, margin[-1] + 1.0) + np.append(margin[0] - 1.0, margin)) / 2
    best = np.flatnonzero(found >= found.max() - _BETTER)
    choice = best[np.argmin(np.abs(offsets[best]))]
    return float(offsets[choice]), float(found[choice])
