"""Regression metrics against scikit-learn, scipy and hand-computed cases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn import metrics as sklearn_metrics

from tunesmith.metrics import regression_metrics

sk: Any = sklearn_metrics  # annotations guessed from docstrings, and wrong
stats: Any = scipy_stats


@pytest.mark.parametrize("seed", range(5))
def test_one_target_agrees_with_scikit_learn_and_scipy(seed: int) -> None:
    generator = np.random.default_rng(seed)
    references = generator.integers(0, 6, size=80) / 2  # ties, as in STS scores
    predictions = np.round(references + generator.normal(size=80), 1)
    ours = regression_metrics(predictions, references)
    theirs = {
        "mse": sk.mean_squared_error(references, predictions),
        "rmse": sk.root_mean_squared_error(references, predictions),
        "mae": sk.mean_absolute_error(references, predictions),
        "pearson": stats.pearsonr(references, predictions).statistic,
        "spearman": stats.spearmanr(references, predictions).statistic,
        "r2": sk.r2_score(references, predictions),
    }
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert 0 < ours["pearson"] < 1
    assert 0 < ours["spearman"] < 1
    assert ours["spearman"] != pytest.approx(ours["pearson"], abs=1e-6)
    assert regression_metrics(predictions.tolist(), references.tolist()) == ours


def test_several_targets_are_averaged_uniformly() -> None:
    generator = np.random.default_rng(0)
    references = generator.normal(size=(50, 3)) * [1, 10, 100]
    predictions = references + generator.normal(size=(50, 3)) * [1, 5, 20]
    ours = regression_metrics(predictions, references)
    pairs = list(zip(predictions.T, references.T, strict=True))
    theirs = {
        "mse": sk.mean_squared_error(references, predictions),
        "rmse": sk.root_mean_squared_error(references, predictions),
        "mae": sk.mean_absolute_error(references, predictions),
        "pearson": np.mean([stats.pearsonr(x, y).statistic for x, y in pairs]),
        "spearman": np.mean([stats.spearmanr(x, y).statistic for x, y in pairs]),
        "r2": sk.r2_score(references, predictions),
    }
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_by_hand() -> None:
    metrics = regression_metrics([1.0, 2.0, 4.0], [1.0, 3.0, 2.0])
    assert metrics["mse"] == pytest.approx(5 / 3)
    assert metrics["rmse"] == pytest.approx(math.sqrt(5 / 3))
    assert metrics["mae"] == 1.0
    assert metrics["r2"] == pytest.approx(1 - 5 / 2)
    assert metrics["spearman"] == pytest.approx(0.5)
    assert metrics["pearson"] == pytest.approx(1 / math.sqrt(14 / 3 * 2))


def test_constant_predictions_have_no_correlation() -> None:
    metrics = regression_metrics([0.1, 0.1, 0.1], [1.0, 2.0, 3.0])
    assert math.isnan(metrics["pearson"])
    assert math.isnan(metrics["spearman"])
    assert metrics["r2"] == pytest.approx(1 - (0.9**2 + 1.9**2 + 2.9**2) / 2)


def test_constant_references() -> None:
    # the mean of three 0.1 is not 0.1: constancy is not left to rounding
    wrong, exact = regression_metrics([0.1, 0.2, 0.3], [0.1] * 3), regression_metrics([0.1] * 3, [0.1] * 3)
    assert (wrong["r2"], exact["r2"]) == (0.0, 1.0)
    assert math.isnan(wrong["pearson"])
    assert math.isnan(wrong["spearman"])


def test_correlations_do_not_depend_on_the_scale() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 30))
    plain = regression_metrics(x, y)
    for scale in (1e-200, 1e150):
        scaled = regression_metrics(x * scale, y * scale)
        assert scaled["pearson"] == pytest.approx(plain["pearson"], abs=1e-12)
        assert scaled["spearman"] == pytest.approx(plain["spearman"], abs=1e-12)


def test_numbers_without_a_score() -> None:
    one = regression_metrics([1.5], [1.0])
    assert (one["mse"], one["rmse"], one["mae"]) == (0.25, 0.5, 0.5)
    assert all(math.isnan(one[name]) for name in ("pearson", "spearman", "r2"))
    for predictions, references in (([], []), ([1.0, math.nan], [1.0, 2.0]), ([1.0, 2.0], [math.inf, 2.0])):
        metrics = regression_metrics(predictions, references)
        assert metrics.keys() == one.keys()
        assert all(math.isnan(value) for value in metrics.values())


def test_squares_out_of_range_do_not_warn() -> None:
    assert regression_metrics([1e200, 0.0], [0.0, 1.0])["mse"] == math.inf


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(AssertionError, match="references"):
        regression_metrics(np.zeros((3, 1)), np.zeros((1, 3)))
