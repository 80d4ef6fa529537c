"""Classification metrics against scikit-learn and hand-computed cases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from tunesmith.metrics import (
    majority_baseline_accuracy,
    multi_label_metrics,
    multi_label_table,
    single_label_metrics,
    single_label_table,
)

sk: Any = sklearn_metrics  # its annotations are guessed from docstrings, and wrong


def _random_ids(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of 7 classes: 0 is never predicted, 5 never occurs, 3 does neither."""
    generator = np.random.default_rng(seed)
    references = generator.choice([0, 1, 2, 4, 6], size=200)
    predictions = np.where(
        generator.random(200) < 0.6, references, generator.choice([1, 2, 4, 5, 6], size=200)
    )
    predictions[predictions == 0] = 5
    return predictions, references


@pytest.mark.parametrize("seed", range(5))
def test_single_label_agrees_with_scikit_learn(seed: int) -> None:
    predictions, references = _random_ids(seed)
    ours = single_label_metrics(predictions, references)

    def f(name: str, average: str) -> float:
        function = {"f1": sk.f1_score, "precision": sk.precision_score, "recall": sk.recall_score}[name]
        return float(function(references, predictions, average=average, zero_division=0))

    theirs = {
        "accuracy": sk.accuracy_score(references, predictions),
        "macro_f1": f("f1", "macro"),
        "micro_f1": f("f1", "micro"),
        "weighted_f1": f("f1", "weighted"),
        "macro_precision": f("precision", "macro"),
        "macro_recall": f("recall", "macro"),
        # every class of the references, answered or not
        "balanced_accuracy": sk.recall_score(
            references, predictions, labels=np.unique(references), average="macro", zero_division=0
        ),
        "mcc": sk.matthews_corrcoef(references, predictions),
    }
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert all(0 < value < 1 for value in ours.values())
    assert single_label_metrics(predictions.tolist(), references.tolist()) == ours


def test_single_label_table_agrees_with_scikit_learn() -> None:
    predictions, references = _random_ids(0)
    names = [f"class {i}" for i in range(7)]
    table = single_label_table(predictions, references, names)
    assert np.array_equal(table.confusion, sk.confusion_matrix(references, predictions, labels=range(7)))
    scores = sk.precision_recall_fscore_support(references, predictions, labels=range(7), zero_division=0)
    for row, name, precision, recall, f1, support in zip(table.classes, names, *scores, strict=True):
        assert (row.name, row.support) == (name, support)
        assert (row.precision, row.recall, row.f1) == pytest.approx((precision, recall, f1), abs=1e-12)
    assert [row.predicted for row in table.classes] == np.bincount(predictions, minlength=7).tolist()
    unused = table.classes[3]
    assert (unused.precision, unused.recall, unused.f1, unused.support) == (0.0, 0.0, 0.0, 0)


def test_single_label_by_hand() -> None:
    # confusion (rows are references): [[2, 1], [1, 0]]
    metrics = single_label_metrics([0, 0, 1, 0], [0, 0, 0, 1])
    assert metrics["accuracy"] == 0.5
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert metrics["weighted_f1"] == pytest.approx(3 / 4 * 2 / 3)
    assert metrics["mcc"] == pytest.approx((2 * 0 - 1 * 1) / math.sqrt(3 * 3 * 1 * 1))


def test_mcc_of_many_rows_does_not_overflow() -> None:
    half = 100_000
    predictions = np.repeat([0, 1], half)
    references = predictions.copy()
    references[: half // 2] = 1
    assert single_label_metrics(predictions, references)["mcc"] == pytest.approx(1 / math.sqrt(3))


def test_mcc_of_one_predicted_class_is_zero() -> None:
    assert single_label_metrics([1, 1, 1], [0, 1, 2])["mcc"] == 0.0
    assert single_label_metrics([0, 1, 2], [1, 1, 1])["mcc"] == 0.0


def test_no_rows_have_no_score() -> None:
    assert all(math.isnan(value) for value in single_label_metrics([], []).values())
    assert single_label_metrics([], []).keys() == single_label_metrics([0], [0]).keys()
    no_rows = np.zeros((0, 3), dtype=bool)
    row = np.ones((1, 3), dtype=bool)
    assert all(math.isnan(value) for value in multi_label_metrics(no_rows, no_rows).values())
    assert multi_label_metrics(no_rows, no_rows).keys() == multi_label_metrics(row, row).keys()
    assert [row.support for row in multi_label_table([], [], ["x", "y"])] == [0, 0]
    table = single_label_table([], [], ["x", "y"])
    assert table.confusion.tolist() == [[0, 0], [0, 0]]
    assert [row.f1 for row in table.classes] == [0.0, 0.0]


def test_wrong_class_ids_are_refused() -> None:
    with pytest.raises(AssertionError, match="1 predictions for 2 references"):
        single_label_metrics([0], [0, 1])
    with pytest.raises(AssertionError, match="not negative"):
        single_label_metrics([0, 0], [0, -100])
    with pytest.raises(AssertionError, match="integers"):
        single_label_metrics(np.array([0.9]), np.array([0.0]))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="class id 2, but only 2 classes"):
        single_label_table([0, 2], [0, 1], ["x", "y"])


def test_majority_baseline() -> None:
    assert majority_baseline_accuracy(["b", "a", "b", "c"], ["b", "a", "c", "b", "c"]) == pytest.approx(2 / 5)
    assert majority_baseline_accuracy([3, 1, 3, 1], [1, 1, 3]) == pytest.approx(2 / 3)  # a tie: the smallest
    assert majority_baseline_accuracy([0, 0, 1], [1, 1]) == 0.0
    assert math.isnan(majority_baseline_accuracy([], [1]))
    assert math.isnan(majority_baseline_accuracy([1], []))
    with pytest.raises(AssertionError, match="do not compare"):
        majority_baseline_accuracy(["0"], [0])


@pytest.mark.parametrize("seed", range(5))
def test_multi_label_agrees_with_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    references = (generator.random((60, 5)) < 0.3).astype(np.int64)
    predictions = np.where(generator.random((60, 5)) < 0.8, references, 1 - references)
    references[:, 1] = 0  # label 1 never occurs,
    predictions[:, 2] = 0  # label 2 is never predicted,
    references[:, 4] = predictions[:, 4] = 0  # label 4 neither
    ours = multi_label_metrics(predictions, references)

    def f(name: str, average: str | None) -> np.ndarray:
        function = {"f1": sk.f1_score, "precision": sk.precision_score, "recall": sk.recall_score}[name]
        return function(references, predictions, average=average, zero_division=0)

    theirs: dict[str, Any] = {
        f"{average}_{name}": f(name, average)
        for average in ("micro", "macro")
        for name in ("f1", "precision", "recall")
    }
    theirs["subset_accuracy"] = sk.accuracy_score(references, predictions)
    for name, score in (
        ("balanced_accuracy", sk.balanced_accuracy_score),
        ("mcc", sk.matthews_corrcoef),
    ):
        told_apart = [i for i in range(references.shape[1]) if len(np.unique(references[:, i])) == 2]
        theirs[name] = np.mean([score(references[:, i], predictions[:, i]) for i in told_apart])
    theirs["hamming_loss"] = sk.hamming_loss(references, predictions)
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert all(0 < value < 1 for value in ours.values())
    assert multi_label_metrics(predictions.astype(bool), references.astype(bool)) == ours

    table = multi_label_table(predictions, references, list("abcde"))
    assert [row.name for row in table] == list("abcde")
    for name in ("precision", "recall", "f1"):
        assert [getattr(row, name) for row in table] == pytest.approx(f(name, None).tolist(), abs=1e-12)
    assert [row.support for row in table] == references.sum(axis=0).tolist()
    assert [row.predicted for row in table] == predictions.sum(axis=0).tolist()


def test_multi_label_by_hand() -> None:
    metrics = multi_label_metrics([[1, 0], [1, 1], [0, 0]], [[1, 1], [1, 1], [0, 1]])
    assert metrics["subset_accuracy"] == pytest.approx(1 / 3)
    assert metrics["hamming_loss"] == pytest.approx(2 / 6)
    assert metrics["micro_f1"] == pytest.approx(2 * 3 / (3 + 5))
    assert metrics["macro_f1"] == pytest.approx((1 + 2 * 1 / (1 + 3)) / 2)


def test_multi_label_with_nothing_set() -> None:
    metrics = multi_label_metrics([[0, 0]], [[0, 0]])
    assert (metrics["micro_f1"], metrics["macro_f1"], metrics["subset_accuracy"]) == (0.0, 0.0, 1.0)


def test_scores_are_not_indicators() -> None:
    with pytest.raises(AssertionError, match="threshold"):
        multi_label_metrics([[0.3, 0.8]], [[0, 1]])  # type: ignore[list-item]
    with pytest.raises(AssertionError, match=r"\[rows, labels\]"):
        multi_label_metrics([0, 1], [0, 1])  # type: ignore[list-item]
    with pytest.raises(AssertionError, match="2 columns for 1 names"):
        multi_label_table([[0, 1]], [[0, 1]], ["x"])
