"""What an ensemble fits, against scipy, scikit-learn and enumeration."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, Ridge

from tunesmith.ensemble import fit
from tunesmith.ensemble.combine import Combiner, best_span, features

Floats = NDArray[np.float64]


def draw(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def slsqp(loss: Any, members: int) -> Floats:
    found = minimize(
        loss,
        np.full(members, 1 / members),
        method="SLSQP",
        bounds=[(0, 1)] * members,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x


@pytest.mark.parametrize("seed", range(4))
def test_mixture_weights_are_those_of_a_constrained_minimiser(seed: int) -> None:
    likelihoods = draw(seed).beta(2, 1 + seed, size=(200, 4)) * np.array([1.0, 0.9, 0.5, 0.95])

    def loss(w: Floats) -> float:
        return float(-np.log(likelihoods @ w).mean())

    found, expected = fit.mixture_weights(likelihoods), slsqp(loss, 4)
    assert found.sum() == pytest.approx(1.0, abs=1e-12)
    assert (found >= 0).all()
    assert loss(found) <= loss(expected) + 1e-7
    assert found == pytest.approx(expected, abs=2e-3)


def test_a_useless_member_gets_no_weight_and_a_zero_does_not_break_the_logarithm() -> None:
    good = draw(0).uniform(0.6, 1.0, 100)
    likelihoods = np.stack([good, np.zeros(100)], -1)
    assert fit.mixture_weights(likelihoods) == pytest.approx([1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_least_squares_weights_are_the_best_of_every_support(seed: int) -> None:
    generator = draw(seed)
    predictions = generator.normal(size=(60, 4))
    targets = predictions @ np.array([0.7, 0.5, -0.3, 0.1]) + 0.1 * generator.normal(size=60)

    def loss(w: Floats) -> float:
        return float(np.square(targets - predictions @ w).mean())

    best = np.inf
    for size in range(1, 5):  # on each support the minimum under Σw = 1 is a linear system (Lagrange)
        for support in map(list, itertools.combinations(range(4), size)):
            x = predictions[:, support]
            system = np.block([[x.T @ x, np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
            w = np.linalg.solve(system, np.append(x.T @ targets, 1.0))[:size]
            if (w >= 0).all():
                whole = np.zeros(4)
                whole[support] = w
                best = min(best, loss(whole))
    found = fit.least_squares_weights(predictions, targets)
    assert found.sum() == pytest.approx(1.0, abs=1e-12)
    assert (found >= 0).all()
    assert loss(found) == pytest.approx(best, rel=1e-9)


def test_the_nearest_point_of_the_simplex() -> None:
    points = draw(1).normal(size=(50, 5))
    for point in points:
        found = fit.onto_simplex(point)
        near = minimize(
            lambda w, p=point: ((w - p) ** 2).sum(),
            np.full(5, 0.2),
            method="SLSQP",
            bounds=[(0, 1)] * 5,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-15},
        ).x
        assert found == pytest.approx(near, abs=1e-6)


@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_the_softmax_regression_is_scikit_learns(strength: float) -> None:
    generator = draw(2)
    x, labels = generator.normal(size=(120, 6)), generator.integers(0, 3, 120)
    x[:, 0] += labels
    found = fit.softmax_regression(x, np.eye(3)[labels], np.zeros((6, 3)), strength)
    theirs = LogisticRegression(C=1 / strength, tol=1e-10, max_iter=5000).fit(x, labels)
    assert pytest.approx(theirs.coef_, abs=1e-4) == found.weight.T
    # a constant in all biases changes nothing: theirs sum to 0
    assert found.bias - found.bias.mean() == pytest.approx(
        theirs.intercept_ - theirs.intercept_.mean(), abs=1e-4
    )


def test_the_sigmoid_regressions_are_scikit_learns() -> None:
    generator = draw(3)
    x = generator.normal(size=(150, 4))
    y = (x[:, :2] + generator.normal(size=(150, 2)) > 0).astype(np.float64)
    found = fit.sigmoid_regression(x, y, np.zeros((4, 2)), 2.0)
    for column in range(2):
        theirs = LogisticRegression(C=0.5, tol=1e-10, max_iter=5000).fit(x, y[:, column])
        assert found.weight[:, column] == pytest.approx(theirs.coef_[0], abs=1e-4)
        assert found.bias[column] == pytest.approx(theirs.intercept_[0], abs=1e-4)


def test_the_ridge_is_scikit_learns() -> None:
    generator = draw(4)
    x, y = generator.normal(size=(50, 4)) + 3, generator.normal(size=(50, 2))
    found = fit.ridge_regression(x, y, np.zeros((4, 2)), 5.0)
    theirs = Ridge(alpha=5.0, solver="cholesky").fit(x, y)
    assert pytest.approx(theirs.coef_, abs=1e-9) == found.weight.T
    assert found.bias == pytest.approx(theirs.intercept_, abs=1e-9)


@pytest.mark.parametrize("how", [fit.softmax_regression, fit.sigmoid_regression, fit.ridge_regression])
def test_a_strong_penalty_leaves_where_it_starts(how: fit.Fit) -> None:
    generator = draw(5)
    x, y = generator.normal(size=(40, 4)), np.eye(2)[generator.integers(0, 2, 40)]
    start = generator.normal(size=(4, 2))
    assert how(x, y, start, 1e9, 100).weight == pytest.approx(start, abs=1e-5)


def test_folds_are_even_and_a_function_of_the_seed() -> None:
    found = fit.folds(23, 5, 7)
    assert sorted(np.bincount(found)) == [4, 4, 5, 5, 5]
    assert (found == fit.folds(23, 5, 7)).all()
    assert (found != fit.folds(23, 5, 8)).any()


# combining


THREE = [np.array(p) for p in ([0.6, 0.4, 0.0], [0.1, 0.5, 0.4], [0.2, 0.3, 0.5])]


def test_a_vote_counts_heads_and_ties_go_to_the_higher_mean() -> None:
    tied = Combiner("single_label", "vote")(THREE)
    assert tied == pytest.approx([1 / 3] * 3, abs=1e-5)
    assert isinstance(tied, np.ndarray)
    assert tied.argmax() == 1  # the means are .3 .4 .3
    two = Combiner("single_label", "vote")([THREE[0], THREE[0], THREE[1]])
    assert two == pytest.approx([2 / 3, 1 / 3, 0], abs=1e-5)


def test_several_labels_are_voted_for_one_by_one() -> None:
    given = [np.array([0.9, 0.6, 0.1]), np.array([0.8, 0.2, 0.3])]
    found = Combiner("multi_label", "vote")(given)
    assert isinstance(found, np.ndarray)
    assert (found > 0.5).tolist() == [True, False, False]  # .6 and .2: a tie, and less than a half on average
    other = Combiner("multi_label", "vote")([np.array([0.9]), np.array([0.4])])
    assert isinstance(other, np.ndarray)
    assert other[0] > 0.5


def test_means_by_hand() -> None:
    assert Combiner("single_label", "mean")(THREE) == pytest.approx([0.3, 0.4, 0.3])
    weighted = Combiner("single_label", "weighted", (0.5, 0.5, 0.0))(THREE)
    assert weighted == pytest.approx([0.35, 0.45, 0.2])


def test_a_word_that_a_member_did_not_see_is_the_others() -> None:
    nan = [np.nan, np.nan]
    given = [np.array([[0.8, 0.2], nan, nan]), np.array([[0.4, 0.6], [0.1, 0.9], nan])]
    found = Combiner("tags", "weighted", (0.75, 0.25))(given)
    assert isinstance(found, np.ndarray)
    assert found[:2] == pytest.approx(np.array([[0.7, 0.3], [0.1, 0.9]]))
    assert np.isnan(found[2]).all()
    voted = Combiner("tags", "vote")(given)
    assert isinstance(voted, np.ndarray)
    assert voted[1].argmax() == 1
    assert np.isnan(voted[2]).all()


def test_answers_of_texts() -> None:
    given = [{"a": 0.6, "b": 0.4}, {"b": 0.7, "": 0.3}, {"a": 0.5, "c": 0.5}]
    mean = Combiner("spans", "mean")(given)
    assert isinstance(mean, dict)
    assert mean == pytest.approx({"a": 1.1 / 3, "b": 1.1 / 3, "": 0.1, "c": 0.5 / 3})
    assert best_span(mean) == "a"
    vote = Combiner("spans", "vote")(given)
    assert isinstance(vote, dict)
    assert best_span(vote) == "a"  # which the third prefers to c by the alphabet


def test_a_stack_that_starts_at_the_mean_is_the_geometric_mean() -> None:
    stack = fit.Linear(np.tile(np.eye(3) / 3, (3, 1)), np.zeros(3), 1.0)
    given = [p + 0.1 for p in THREE]
    given = [p / p.sum() for p in given]
    found = Combiner("single_label", "stack", stack=stack)(given)
    product = np.prod(given, axis=0) ** (1 / 3)
    assert found == pytest.approx(product / product.sum())
    assert features(np.stack(given), "single_label").shape == (9,)
