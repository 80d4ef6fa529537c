"""Areas under curves, calibration and temperature, against scikit-learn, scipy and numbers by hand."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    log_loss,
    matthews_corrcoef,
    roc_auc_score,
)

from tunesmith.decisions import Decisions, log_odds
from tunesmith.decisions.temperature import LEAST, fit_temperature
from tunesmith.metrics.calibration import (
    ece,
    multi_label_calibration,
    reliability,
    single_label_calibration,
)
from tunesmith.metrics.labels import multi_label_metrics, single_label_metrics
from tunesmith.metrics.ranking import average_precision, curve_areas, precision_recall_curve, roc_auc


def scored(seed: int, rows: int = 300, digits: int = 8) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    truth = random.random(rows) < 0.1
    return np.round(random.random(rows) * 0.7 + 0.3 * truth, digits), truth


def many(seed: int, rows: int = 400, labels: int = 5) -> tuple[Any, Any]:
    """Logits that are too sure of themselves, and labels."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, labels, rows)
    return 3.0 * (random.normal(size=(rows, labels)) + 1.5 * np.eye(labels)[truth]), truth


def least(loss: Any) -> float:
    found: Any = minimize_scalar(loss, bounds=(0.1, 20.0), method="bounded", options={"xatol": 1e-10})
    return found.x


@pytest.mark.parametrize("digits", [8, 1])
@pytest.mark.parametrize("seed", range(4))
def test_areas_are_scikit_learns(seed: int, digits: int) -> None:
    scores, truth = scored(seed, digits=digits)
    assert average_precision(scores, truth) == pytest.approx(
        average_precision_score(truth, scores), abs=1e-12
    )
    assert roc_auc(scores, truth) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)


def test_areas_without_a_label_or_without_its_absence() -> None:
    scores = np.array([0.1, 0.9])
    none, every = np.zeros(2, dtype=bool), np.ones(2, dtype=bool)
    assert math.isnan(average_precision(scores, none))
    assert math.isnan(roc_auc(scores, none))
    assert average_precision(scores, every) == 1.0
    assert math.isnan(roc_auc(scores, every))
    one = curve_areas(np.stack([scores, scores], axis=1), np.array([[0, 0], [1, 0]], dtype=bool))
    assert one == {"pr_auc": 1.0, "roc_auc": 1.0}
    assert all(map(math.isnan, curve_areas(np.empty((0, 2)), np.empty((0, 2), dtype=bool)).values()))


@pytest.mark.parametrize("rows", [5, 300, 5000])
def test_the_curve_has_few_points_and_both_ends(rows: int) -> None:
    scores, truth = scored(0, rows)
    truth[0] = True
    curve = precision_recall_curve(scores, truth)
    assert len(curve["recall"]) == len(curve["precision"]) == len(curve["score"]) <= 100
    assert curve["recall"][-1] == 1.0
    assert curve["recall"] == sorted(curve["recall"])
    for recall, precision, score in zip(*curve.values(), strict=True):
        chosen = scores >= score
        assert recall == pytest.approx(truth[chosen].sum() / truth.sum())
        assert precision == pytest.approx(truth[chosen].mean())


@pytest.mark.parametrize("labels", [2, 5])
def test_single_label_scores_are_scikit_learns(labels: int) -> None:
    logits, truth = many(1, labels=labels)
    p = np.exp(log_softmax(logits, axis=1))
    found = single_label_calibration(p, truth)
    assert found["log_loss"] == pytest.approx(log_loss(truth, p), rel=1e-12)
    expected = brier_score_loss(truth, p[:, 1]) if labels == 2 else brier_score_loss(truth, p)
    assert found["brier"] == pytest.approx(expected, rel=1e-12)


def test_multi_label_scores_are_scikit_learns_of_all_cells() -> None:
    random = np.random.default_rng(0)
    p, y = random.random((200, 3)), random.integers(0, 2, (200, 3))
    found = multi_label_calibration(p, y)
    assert found["log_loss"] == pytest.approx(log_loss(y.ravel(), p.ravel()), rel=1e-12)
    assert found["brier"] == pytest.approx(brier_score_loss(y.ravel(), p.ravel()), rel=1e-12)


def test_balanced_accuracy_and_mcc_are_scikit_learns() -> None:
    random = np.random.default_rng(5)
    y, p = random.integers(0, 4, 200), random.integers(0, 4, 200)
    y[y == 3] = 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label is answered that no row has
        expected = balanced_accuracy_score(y, p)
    assert single_label_metrics(p, y)["balanced_accuracy"] == pytest.approx(expected)
    many, chosen = random.integers(0, 2, (100, 5)), random.integers(0, 2, (100, 5))
    many[:, 3], many[:, 4] = 0, 1
    found = multi_label_metrics(chosen, many)
    for name, score in (("balanced_accuracy", balanced_accuracy_score), ("mcc", matthews_corrcoef)):
        each = [score(many[:, i], chosen[:, i]) for i in range(3)]
        assert found[name] == pytest.approx(np.mean(each))
    assert math.isnan(multi_label_metrics(chosen[:, 3:], many[:, 3:])["mcc"])


def test_a_probability_of_nothing_costs_what_scikit_learn_says() -> None:
    p, truth = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([1, 0])
    assert single_label_calibration(p, truth)["log_loss"] == pytest.approx(log_loss(truth, p))


def test_calibration_error_by_hand() -> None:
    p = np.array([0.62, 0.64, 0.95, 0.99, 1.0, 0.0])
    truth = np.array([True, False, True, True, False, False])
    bins = reliability(p, truth)
    assert [(one["count"], round(one["low"] * 15)) for one in bins] == [(1, 0), (2, 9), (3, 14)]
    expected = (1 * 0.0 + 2 * abs(0.5 - 0.63) + 3 * abs(2 / 3 - 0.98)) / 6
    assert ece(bins) == pytest.approx(expected)


def test_a_bin_has_its_upper_edge() -> None:
    (one,) = reliability(np.array([0.2]), np.array([True]), bins=5)
    assert (one["low"], one["high"]) == (0.0, 0.2)


@pytest.mark.parametrize("seed", range(3))
def test_the_temperature_has_the_least_loss(seed: int) -> None:
    logits, truth = many(seed)

    def loss(temperature: float) -> float:
        scaled = logits / temperature
        return float((logsumexp(scaled, axis=1) - scaled[np.arange(len(truth)), truth]).mean())

    expected = least(loss)
    found = fit_temperature(logits, np.eye(5)[truth], exclusive=True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found is not None
    assert found > 1.5
    assert loss(found) < loss(1.0)


def test_the_temperature_of_several_labels() -> None:
    random = np.random.default_rng(2)
    logits = random.normal(size=(500, 3))
    truth = (random.random((500, 3)) < 1 / (1 + np.exp(-logits / 2))).astype(np.float64)

    def loss(temperature: float) -> float:
        scaled = logits / temperature
        return float((np.logaddexp(0, scaled) - truth * scaled).mean())

    expected = least(loss)
    assert fit_temperature(logits, truth, exclusive=False) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rows_that_are_all_right_or_all_wrong_have_no_temperature(sign: float) -> None:
    truth = np.eye(3)[np.array([0, 1, 2, 0])]
    assert fit_temperature(sign * truth, truth, exclusive=True) is None


@pytest.mark.parametrize("exclusive", [True, False])
def test_probabilities_at_a_temperature(exclusive: bool) -> None:
    logits, _ = many(3)

    def probabilities(z: Any) -> Any:
        return np.exp(log_softmax(z, axis=1)) if exclusive else 1 / (1 + np.exp(-z))

    single = probabilities(logits).astype(np.float32)
    found = Decisions(temperature=2.5).calibrated(single, exclusive=exclusive)
    # where an fp32 sigmoid is near 1 its logit is known to a few digits only
    assert np.abs(found - probabilities(logits / 2.5)).max() < (1e-5 if exclusive else 1e-4)
    assert np.array_equal(found.argmax(axis=1), single.argmax(axis=1))
    assert np.array_equal(Decisions().calibrated(single, exclusive=exclusive), single.astype(np.float64))


def test_probabilities_that_rounded_to_the_ends_stay_finite() -> None:
    ends = np.array([[0.0, 1.0]], dtype=np.float32)
    for exclusive in (True, False):
        assert np.isfinite(log_odds(ends.astype(np.float64), exclusive=exclusive)).all()
        for temperature in (LEAST, 1.0, 30.0):
            found = Decisions(temperature=temperature).calibrated(ends, exclusive=exclusive)
            assert np.isfinite(found).all()
