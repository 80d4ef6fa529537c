"""Thresholds and offsets against every possibility tried by hand, with scikit-learn's metrics."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, matthews_corrcoef

from tunesmith.decisions import UNDECIDED, Decisions
from tunesmith.decisions.thresholds import best_offsets, best_threshold

# of labels that are never answered F1 is 0, which scikit-learn warns of
NOTHING: Any = 0
F1: Any = partial(f1_score, zero_division=NOTHING)
MEASURES: dict[str, Any] = {
    "f1": F1,
    "macro_f1": lambda y, p: F1(y, p, average="macro", labels=[0, 1]),
    "balanced_accuracy": balanced_accuracy_score,
    "accuracy": accuracy_score,
    "mcc": matthews_corrcoef,
}
MANY: dict[str, Any] = {
    "macro_f1": lambda y, p: F1(y, p, average="macro", labels=np.unique(y)),
    "balanced_accuracy": lambda y, p: np.mean([np.mean(p[y == k] == k) for k in np.unique(y)]),
    "accuracy": accuracy_score,
}


def rows(seed: int, count: int = 60, share: float = 0.2, digits: int = 8) -> tuple[Any, Any]:
    """Scores that say something of the truth; with few `digits` there are ties."""
    random = np.random.default_rng(seed)
    truth = random.random(count) < share
    scores = 1 / (1 + np.exp(-(random.normal(-2, 1, count) + 2 * truth)))
    return np.round(scores, digits), truth


@pytest.mark.parametrize("metric", MEASURES)
@pytest.mark.parametrize("digits", [8, 1])
@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_is_better(metric: str, digits: int, seed: int) -> None:
    scores, truth = rows(seed, digits=digits)
    found = best_threshold(scores, truth, metric)
    reached = MEASURES[metric](truth, scores > found)
    everywhere = [-1.0, *scores, 1.0]
    assert reached == pytest.approx(max(MEASURES[metric](truth, scores > t) for t in everywhere), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "truth", "low", "high"),
    [
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 0.2, 0.8),
        ([0.0, 0.0, 1.0], [0, 0, 1], 0.0, 1.0),
        ([0.9, 1.0], [1, 1], -1.0, 0.9),
        ([0.0, 0.0], [1, 1], -1.0, 0.0),
        ([0.3, np.nextafter(0.3, 1.0)], [0, 1], 0.3, np.nextafter(0.3, 1.0)),
    ],
)
def test_thresholds_stand_between_scores(
    scores: list[float], truth: list[int], low: float, high: float
) -> None:
    found = best_threshold(np.array(scores), np.array(truth, dtype=bool), "f1")
    assert low <= found < high
    assert np.array_equal(np.array(scores) > found, np.array(truth, dtype=bool))


@pytest.mark.parametrize("metric", MANY)
@pytest.mark.parametrize("seed", range(6))
def test_no_single_offset_makes_it_better(metric: str, seed: int) -> None:
    """A coordinate-wise optimum: each label's offset among all that change an answer."""
    random = np.random.default_rng(seed)
    truth = random.choice(4, 80, p=[0.7, 0.2, 0.1, 0.0])
    logits = random.normal(size=(80, 4)) + 1.5 * np.eye(4)[truth] + [1.0, 0.0, -1.0, -1.0]
    offsets = np.array(best_offsets(logits, truth, metric))

    def reached(by: Any) -> float:
        return float(MANY[metric](truth, (logits + by).argmax(axis=1)))

    assert reached(offsets) >= reached(np.zeros(4))
    assert offsets[3] == 0.0
    for label in range(3):
        for margin in np.delete(logits + offsets, label, axis=1).max(axis=1) - logits[:, label]:
            for side in (-1e-9, 1e-9):
                other = offsets.copy()
                other[label] = margin + side
                assert reached(other) <= reached(offsets) + 1e-12


def test_offsets_of_two_labels_are_a_threshold() -> None:
    scores, truth = rows(3)
    p = np.stack([1 - scores, scores], axis=1)
    offsets = np.array(best_offsets(np.log(p), truth.astype(np.int64), "macro_f1"))
    by_offset = MEASURES["macro_f1"](truth, (np.log(p) + offsets).argmax(axis=1))
    by_threshold = MEASURES["macro_f1"](truth, scores > best_threshold(scores, truth, "macro_f1"))
    assert by_offset == pytest.approx(by_threshold, abs=1e-12)


def test_what_is_good_already_stays() -> None:
    truth = np.array([0, 1, 2, 1])
    assert best_offsets(np.eye(3)[truth], truth, "macro_f1") == (0.0, 0.0, 0.0)


def test_answers_follow_the_decisions() -> None:
    p = np.array([[0.8, 0.2], [0.6, 0.4], [0.4, 0.6]])
    assert UNDECIDED.one_label(p).tolist() == [0, 0, 1]
    assert Decisions(threshold=0.3, positive=1).one_label(p).tolist() == [0, 1, 1]
    assert Decisions(threshold=0.7, positive=0).one_label(p).tolist() == [0, 1, 1]
    assert Decisions(offsets=(0.0, 10.0)).one_label(p).tolist() == [1, 1, 1]
    assert UNDECIDED.many_labels(p).tolist() == [[1, 0], [1, 0], [0, 1]]
    assert Decisions(thresholds=(0.7, 0.3)).many_labels(p).tolist() == [[1, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("temperature", "chosen"),
    list(
        product(
            (None, 1.7),
            ({}, {"threshold": 0.25, "positive": 1}, {"thresholds": (0.1, 0.9)}, {"offsets": (0.0, 1.5)}),
        )
    ),
)
def test_decisions_survive_json(temperature: float | None, chosen: dict[str, Any]) -> None:
    made = Decisions(temperature=temperature, **chosen)
    assert Decisions.of(made.state()) == made
    assert made.chooses == bool(chosen)
