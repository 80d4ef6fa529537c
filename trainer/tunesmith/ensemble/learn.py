"""A combiner fitted on validation answers, and its answers to rows that it was not fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tunesmith.ensemble import fit
from tunesmith.ensemble.answers import Answer, Floats
from tunesmith.ensemble.combine import Combiner, Method, activated, features
from tunesmith.ensemble.members import Kind
from tunesmith.ensemble.truth import Truth
from tunesmith.errors import UserError
from tunesmith.tracking.progress import track

Given = Sequence[Answer]  # one example's answers, one per member

_SMALLEST = 1e-12


def learn(truth: Truth, method: Method, given: Mapping[int, Given], seed: int) -> Combiner:
    """Fits the method on the examples whose numbers are the keys of `given`. Votes and means have nothing to learn."""
    match method:
        case "vote" | "mean":
            return Combiner(truth.kind, method)
        case "weighted":
            return Combiner(truth.kind, method, tuple(float(w) for w in _weights(truth, given)))
        case "stack":
            return Combiner(truth.kind, method, stack=_stack(truth, given, seed))


def _weights(truth: Truth, given: Mapping[int, Given]) -> Floats:
    if truth.kind == "regression":
        predictions = np.concatenate(
            [np.stack([np.ravel(np.asarray(a)) for a in g], -1) for g in given.values()]
        )
        targets = np.concatenate([truth.target(number)[0] for number in given])
        return fit.least_squares_weights(predictions, targets)
    parts = [np.stack([truth.likelihood(number, a) for a in g], -1) for number, g in given.items()]
    likelihoods = np.concatenate(parts)
    # what one member did not see says nothing about the others' weights
    return fit.mixture_weights(likelihoods[~np.isnan(likelihoods).any(-1)])


def _stack(truth: Truth, given: Mapping[int, Given], seed: int) -> fit.Linear:
    """Towards the plain mean of the members (of log-probabilities or numbers), as strongly as 3 folds find best."""
    members = len(next(iter(given.values())))
    x = np.concatenate(
        [_rows(features(np.stack([np.asarray(a) for a in g]), truth.kind)) for g in given.values()]
    )
    y = np.concatenate([truth.target(number) for number in given])
    seen = ~np.isnan(x).any(-1)
    x, y = x[seen], y[seen]
    if len(x) < 6:
        raise UserError(f"--method stack: {len(x)} validation rows are too few to fit a model on: use mean")
    start = np.tile(np.eye(y.shape[1]) / members, (members, 1))
    how = _fit_of(truth.kind)

    def loss(outputs: Floats, targets: Floats) -> float:
        return _loss(truth.kind, outputs, targets)

    return how(x, y, start, fit.choose_strength(x, y, start, how, loss, seed), fit.EXACT)


def _rows(values: Floats) -> Floats:
    return values.reshape(-1, values.shape[-1])


def _fit_of(kind: Kind) -> fit.Fit:
    match kind:
        case "regression":
            return fit.ridge_regression
        case "multi_label":
            return fit.sigmoid_regression
        case _:
            return fit.softmax_regression


def _loss(kind: Kind, outputs: Floats, targets: Floats) -> float:
    found = activated(outputs, kind)
    if kind == "regression":
        return float(np.square(found - targets).mean())
    right = np.where(targets > 0, found, 1.0 - found) if kind == "multi_label" else (found * targets).sum(-1)
    return float(-np.log(np.maximum(right, _SMALLEST)).mean())


def out_of_fold(
    truth: Truth, method: Method, given: Mapping[int, Given], count: int, seed: int
) -> list[Answer]:
    """The answer to each example of a combiner fitted on the other folds (Wolpert 1992), in the order of `given`.
    Raises UserError where there are fewer examples than folds."""
    if len(given) < count:
        raise UserError(f"--out-of-fold {count}: there are {len(given)} validation rows only")
    numbers = list(given)
    fold = fit.folds(len(numbers), count, seed)
    found: dict[int, Answer] = {}
    for k in track(range(count), "fitting out of fold", count):
        combiner = learn(
            truth, method, {n: given[n] for n, own in zip(numbers, fold, strict=True) if own != k}, seed
        )
        found |= {n: combiner(given[n]) for n, own in zip(numbers, fold, strict=True) if own == k}
    return [found[number] for number in numbers]
