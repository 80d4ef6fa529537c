"""What an ensemble learns from validation predictions: one weight per member, or a model on top of them. Plain fp64
numbers in and out; every problem here is convex, so that what is found does not hang on where the search began."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.data.order import Salt, shuffled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_ITERATIONS = 20_000
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""The strengths of the L2 penalty that are tried."""


def mixture_weights(likelihoods: Floats, tolerance: float = 1e-7) -> Floats:
    """The non-negative weights w [members], summing to 1, that minimise −mean log Σ_m w_m p_m(y), the log-loss of the
    weighted mean of the members' probabilities. `likelihoods` [rows, members]: what each gave to the right answer.

    The EM algorithm for mixture proportions: w_m ← mean_i w_m p_im / Σ_k w_k p_ik (Dempster, Laird & Rubin 1977). With
    g_m = mean_i p_im / Σ_k w_k p_ik, the log-loss is at most max_m g_m − 1 above the optimum (the duality gap of a
    convex function on the simplex), which ends the search at `tolerance` nats."""
    safe = np.maximum(likelihoods, np.finfo(np.float64).tiny ** 0.5)
    weights = np.full(safe.shape[1], 1.0 / safe.shape[1])
    for _ in range(_ITERATIONS):
        gain = (safe / (safe @ weights)[:, None]).mean(0)
        if gain.max() - 1.0 <= tolerance:
            break
        weights = weights * gain
    return weights / weights.sum()


def least_squares_weights(predictions: Floats, targets: Floats, tolerance: float = 1e-12) -> Floats:
    """The non-negative weights w [members], summing to 1, that minimise mean (y − Σ_m w_m p_m)². `predictions` [rows,
    members], `targets` [rows]. Accelerated projected gradients (Beck & Teboulle 2009) with restarts, until the
    duality gap g·w − min g is `tolerance` times the mean square of the targets."""
    n, members = predictions.shape
    gram, cross = predictions.T @ predictions / n, predictions.T @ targets / n
    step = 1.0 / max(float(np.linalg.eigvalsh(gram)[-1]), 1e-300)
    weights = ahead = np.full(members, 1.0 / members)
    momentum, enough = 1.0, tolerance * max(float((targets**2).mean()), 1e-300)
    for _ in range(_ITERATIONS):
        gradient = gram @ weights - cross
        if float(gradient @ weights - gradient.min()) <= enough:
            break
        after = onto_simplex(ahead - step * (gram @ ahead - cross))
        faster = (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5) / 2.0
        if float((ahead - after) @ (after - weights)) > 0:  # it went too far: begin to gather speed again
            faster = 1.0
        ahead = after + (momentum - 1.0) / faster * (after - weights)
        weights, momentum = after, faster
    return weights


def onto_simplex(point: Floats) -> Floats:
    """The nearest point with non-negative coordinates that sum to 1 (Held, Wolfe & Crowder 1974)."""
    ordered = np.sort(point)[::-1]
    excess = (np.cumsum(ordered) - 1.0) / np.arange(1, len(point) + 1)
    return np.maximum(point - excess[ordered > excess][-1], 0.0)


@dataclass(frozen=True, slots=True)
class Linear:
    """x ↦ x · weight + bias: `weight` [features, outputs], `bias` [outputs]."""

    weight: Floats
    bias: Floats
    strength: float

    def __call__(self, features: Floats) -> Floats:
        """[rows, features] → [rows, outputs]."""
        return features @ self.weight + self.bias


Fit = Callable[[Floats, Floats, Floats, float, int], Linear]
"""(features [rows, features], targets [rows, outputs], the weight that is not penalised [features, outputs], strength,
the most iterations) → the fit."""

_ROUGH, EXACT = 40, 500  # iterations: to compare strengths, and of what is kept


def softmax_regression(
    features: Floats, targets: Floats, start: Floats, strength: float, iterations: int = EXACT
) -> Linear:
    """Multinomial logistic regression: argmin over W, b of Σ_i −Σ_c y_ic log softmax(x_i W + b)_c
    + strength/2 ‖W − start‖². `targets` [rows, classes], rows of a distribution."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return -(y * logits.log_softmax(-1)).sum()

    return _logistic(features, targets, start, strength, iterations, loss)


def sigmoid_regression(
    features: Floats, targets: Floats, start: Floats, strength: float, iterations: int = EXACT
) -> Linear:
    """A logistic regression per output, all on the same features: as `softmax_regression` with Σ_c of the binary
    cross-entropies. `targets` [rows, outputs] of 0 and 1."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")

    return _logistic(features, targets, start, strength, iterations, loss)


def _logistic(
    features: Floats,
    targets: Floats,
    start: Floats,
    strength: float,
    iterations: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Linear:
    x, y, w0 = (
        torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64)) for v in (features, targets, start)
    )
    weight, bias = (
        w0.clone().requires_grad_(),
        torch.zeros(y.shape[1], dtype=torch.float64, requires_grad=True),
    )
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-6 * len(x), tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(x @ weight + bias, y) + 0.5 * strength * (weight - w0).square().sum()
        value.backward()
        return value

    search.step(closure)  # pyright: ignore[reportArgumentType] — it returns the Tensor that LBFGS takes
    return Linear(weight.detach().numpy(), bias.detach().numpy(), strength)


def ridge_regression(features: Floats, targets: Floats, start: Floats, strength: float, _: int = 0) -> Linear:
    """argmin over W, b of Σ_i ‖y_i − x_i W − b‖² + strength ‖W − start‖² (Hoerl & Kennard 1970), b not penalised.
    `targets` [rows, outputs]. Solved at once, in no iterations."""
    x_mean, y_mean = features.mean(0), targets.mean(0)
    x, y = features - x_mean, targets - y_mean
    weight = start + np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ (y - x @ start))
    return Linear(weight, y_mean - x_mean @ weight, strength)


def folds(rows: int, count: int, seed: int) -> Ints:
    """The fold of each row [rows]: sizes differ by one at most; a pure function of the arguments."""
    found = np.empty(rows, dtype=np.int64)
    found[shuffled(np.arange(rows, dtype=np.int64), seed, 0, Salt.SPLIT)] = np.arange(rows) % count
    return found


def choose_strength(
    features: Floats,
    targets: Floats,
    start: Floats,
    fit: Fit,
    loss: Callable[[Floats, Floats], float],
    seed: int,
) -> float:
    """The strength whose fits have the lowest loss on rows left out, in 3 folds. They
    begin at the mean of the members, so that a few iterations tell them apart. `loss` takes (outputs, targets)."""
    fold = folds(len(features), 3, seed)
    scores: list[float] = []
    for strength in STRENGTHS:
        total = 0.0
        for k in range(3):
            seen, left = fold != k, fold == k
            found = fit(features[seen], targets[seen], start, strength, _ROUGH)
            total += loss(found(features[left]), targets[left]) * int(left.sum())
        scores.append(total)
    return STRENGTHS[int(np.argmin(scores))]
