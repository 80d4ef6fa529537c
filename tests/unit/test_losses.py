"""Each loss against an independent computation in fp64, its gradient by finite differences, and what it does at the
edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, softmax
from sklearn.metrics import log_loss, ndcg_score
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from tunesmith.losses.choose import probabilities
from tunesmith.losses.dice import Dice
from tunesmith.losses.numbers import AbsoluteError, Huber
from tunesmith.losses.ordinal import Corn, Cumulative, EarthMover, corn_probabilities
from tunesmith.losses.ranking import list_losses
from tunesmith.losses.sigmoid import BinaryCrossEntropy, SigmoidFocal
from tunesmith.losses.softmax import LDAM, CrossEntropy, Focal
from tunesmith.losses.weights import balanced, effective, margins
from tunesmith.metrics.lists import list_metrics
from tunesmith.recipe import losses as settings

UNITS, CLASSES = 7, 5
COUNTS = (40, 20, 9, 4, 2)
WEIGHTS = (0.5, 1.0, 1.5, 2.0, 4.0)


def logits(outputs: int = CLASSES) -> Tensor:
    return 2 * torch.randn(UNITS, outputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


CLASS = torch.tensor([0, 1, 2, 3, 4, 1, 0])
MANY = torch.tensor(np.random.default_rng(0).integers(0, 2, (UNITS, CLASSES)), dtype=torch.float64)
SOFT = torch.tensor(np.random.default_rng(1).dirichlet([1.0] * CLASSES, UNITS))
NUMBERS = logits() + torch.linspace(-2, 2, UNITS * CLASSES, dtype=torch.float64).view(UNITS, CLASSES)
ALL = torch.ones(UNITS, dtype=torch.bool)
PICK = np.arange(UNITS), CLASS.numpy()


def binary(z: Any, y: Any) -> Any:
    return -(y * np.log(expit(z)) + (1 - y) * np.log(expit(-z)))


def hot() -> Any:
    return np.eye(CLASSES)[CLASS]


def smoothed(z: Any, target: Any) -> Any:
    return -((0.9 * target + 0.1 / CLASSES) * log_softmax(z, axis=-1) * WEIGHTS).sum(-1)


def focal(z: Any) -> Any:
    p = softmax(z, axis=-1)[PICK]
    return -np.array(WEIGHTS)[CLASS] * (1 - p) ** 1.5 * np.log(p)


def sigmoid_focal(z: Any) -> Any:
    y, p = MANY.numpy(), expit(z)
    p_t, alpha = np.where(y == 1, p, 1 - p), np.where(y == 1, 0.25, 0.75)
    return (-alpha * (1 - p_t) ** 2 * np.log(p_t)).mean(-1)


def ldam(z: Any) -> Any:
    lowered = z - hot() * [0.5 * (2 / n) ** 0.25 for n in COUNTS]
    return -log_softmax(3.0 * lowered, axis=-1)[PICK] * np.array(WEIGHTS)[CLASS]


def cumulative(z: Any) -> Any:
    p = softmax(z, axis=-1)
    return np.array(
        [
            -np.mean(
                [math.log(row[k + 1 :].sum() if y > k else row[: k + 1].sum()) for k in range(CLASSES - 1)]
            )
            for row, y in zip(p, CLASS.tolist(), strict=True)
        ]
    )


def earth_mover(z: Any) -> Any:
    return ((np.cumsum(softmax(z, -1), -1) - np.cumsum(hot(), -1))[:, :-1] ** 2).mean(-1)


def corn(z: Any) -> Any:
    return np.array(
        [
            sum(binary(row[k], float(y > k)) for k in range(CLASSES - 1) if y >= k)
            for row, y in zip(z, CLASS.tolist(), strict=True)
        ]
    )


def dice(z: Any) -> Any:
    p, y = softmax(z, -1), hot()
    q = (1 - p) ** 0.3 * p
    return (1 - (2 * q * y + 0.7) / (q + y + 0.7)).mean(-1)


Case = tuple[Any, Tensor, Tensor, Callable[[Any], Any]]
CASES: dict[str, Case] = {
    "cross_entropy": (CrossEntropy(), logits(), CLASS, lambda z: -log_softmax(z, -1)[PICK]),
    "weighted": (
        CrossEntropy(WEIGHTS), logits(), CLASS, lambda z: -log_softmax(z, -1)[PICK] * np.array(WEIGHTS)[CLASS],
    ),
    "smoothed": (CrossEntropy(WEIGHTS, 0.1), logits(), CLASS, lambda z: smoothed(z, hot())),
    "soft": (CrossEntropy(), logits(), SOFT, lambda z: -(SOFT.numpy() * log_softmax(z, -1)).sum(-1)),
    "soft smoothed": (CrossEntropy(WEIGHTS, 0.1), logits(), SOFT, lambda z: smoothed(z, SOFT.numpy())),
    "binary": (BinaryCrossEntropy(), logits(), MANY, lambda z: binary(z, MANY.numpy()).mean(-1)),
    "binary weighted": (
        BinaryCrossEntropy(WEIGHTS, WEIGHTS[::-1], 0.1), logits(), MANY,
        lambda z: (
            (-(t := 0.9 * MANY.numpy() + 0.05) * WEIGHTS * np.log(expit(z)) - (1 - t) * np.log(expit(-z)))
            * WEIGHTS[::-1]
        ).mean(-1),
    ),
    "one against the rest": (
        BinaryCrossEntropy(weights=WEIGHTS, exclusive=True), logits(), CLASS,
        lambda z: binary(z, hot()).mean(-1) * np.array(WEIGHTS)[CLASS],
    ),
    "absolute": (AbsoluteError(), logits(), NUMBERS, lambda z: np.abs(z - NUMBERS.numpy()).mean(-1)),
    "huber": (
        Huber(0.7), logits(), NUMBERS,
        lambda z: np.where(
            (e := np.abs(z - NUMBERS.numpy())) <= 0.7, e**2 / 2, 0.7 * (e - 0.35)
        ).mean(-1),
    ),
    "focal": (Focal(1.5, WEIGHTS), logits(), CLASS, focal),
    "focal below 1": (
        Focal(0.5), logits(), CLASS,
        lambda z: -((1 - (p := softmax(z, -1)[PICK])) ** 0.5) * np.log(p),
    ),
    "sigmoid focal": (SigmoidFocal(2.0, (0.25,) * CLASSES), logits(), MANY, sigmoid_focal),
    "ldam": (LDAM(margins(COUNTS, 0.5), 3.0, WEIGHTS), logits(), CLASS, ldam),
    "cumulative": (Cumulative(), logits(), CLASS, cumulative),
    "emd": (EarthMover(), logits(), CLASS, earth_mover),
    "corn": (Corn(), logits(CLASSES - 1), CLASS, corn),
    "dice": (Dice(0.7, 0.3), logits(), CLASS, dice),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_its_formula(name: str) -> None:
    loss, z, labels, reference = CASES[name]
    expected = torch.as_tensor(np.asarray(reference(z.numpy())))
    torch.testing.assert_close(loss(z, labels, ALL), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_is_that_of_the_loss(name: str) -> None:
    loss, z, labels, _ = CASES[name]
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, ALL), z.clone().requires_grad_())


@pytest.mark.parametrize("name", CASES)
def test_a_unit_knows_nothing_of_the_others(name: str) -> None:
    loss, z, labels, _ = CASES[name]
    alone = [loss(z[i : i + 1], labels[i : i + 1], ALL[:1]) for i in range(UNITS)]
    torch.testing.assert_close(torch.cat(alone), loss(z, labels, ALL), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in CASES if name not in {"absolute", "huber"}])
@pytest.mark.parametrize("size", [0.0, 60.0, 1e4])
def test_certain_answers_have_finite_losses_and_gradients(name: str, size: float) -> None:
    loss, z, labels, _ = CASES[name]
    certain = torch.zeros_like(z, dtype=torch.float32)
    certain[:, 0] = size
    certain.requires_grad_()
    found = loss(certain, labels if not labels.is_floating_point() else labels.float(), ALL)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()


def test_weights_are_scikit_learns_and_average_one_over_the_rows() -> None:
    labels = np.repeat(np.arange(CLASSES), COUNTS)
    found = balanced(COUNTS)
    assert found == pytest.approx(compute_class_weight("balanced", classes=np.arange(CLASSES), y=labels))
    for weights in (found, effective(COUNTS, 0.99), effective(COUNTS, 0.0)):
        assert np.array(weights)[labels].mean() == pytest.approx(1.0)
    raw = np.array([(1 - 0.99) / (1 - 0.99**n) for n in COUNTS])
    assert np.array(effective(COUNTS, 0.99)) / raw == pytest.approx(effective(COUNTS, 0.99)[0] / raw[0])
    assert effective(COUNTS, 0.0) == pytest.approx([1.0] * CLASSES)
    # beta → 1 is the inverse frequency
    assert effective(COUNTS, 1 - 1e-9) == pytest.approx(balanced(COUNTS), rel=1e-6)


def test_weighted_cross_entropy_is_scikit_learns_log_loss_times_the_weights() -> None:
    z = logits()
    ours = CrossEntropy(WEIGHTS)(z, CLASS, ALL).sum() / sum(WEIGHTS[c] for c in CLASS.tolist())
    weights = [WEIGHTS[c] for c in CLASS.tolist()]
    theirs = log_loss(CLASS.numpy(), softmax(z.numpy(), -1), sample_weight=weights, labels=np.arange(CLASSES))
    assert float(ours) == pytest.approx(theirs)


def test_without_focus_focal_is_cross_entropy() -> None:
    z = logits()
    torch.testing.assert_close(Focal(0.0)(z, CLASS, ALL), CrossEntropy()(z, CLASS, ALL))
    torch.testing.assert_close(SigmoidFocal(0.0)(z, MANY, ALL), BinaryCrossEntropy()(z, MANY, ALL))


def test_ordinal_losses_of_two_labels() -> None:
    z, labels = logits(2), CLASS.clamp_max(1)
    torch.testing.assert_close(Cumulative()(z, labels, ALL), CrossEntropy()(z, labels, ALL))
    p = z.softmax(-1)[torch.arange(UNITS), labels]
    torch.testing.assert_close(EarthMover()(z, labels, ALL), (1 - p) ** 2)


def test_corn_is_the_likelihood_of_its_own_probabilities() -> None:
    z = logits(CLASSES - 1)
    p = corn_probabilities(z)
    torch.testing.assert_close(p.sum(-1), torch.ones(UNITS, dtype=torch.float64))
    torch.testing.assert_close(Corn()(z, CLASS, ALL), -p[torch.arange(UNITS), CLASS].log())
    beyond = p.flip(-1).cumsum(-1).flip(-1)[:, 1:]
    torch.testing.assert_close(beyond, z.sigmoid().cumprod(-1))


@pytest.mark.parametrize("far", [1, 2, 3, 4])
def test_ordinal_losses_grow_with_the_distance(far: int) -> None:
    for loss in (Cumulative(), EarthMover()):
        z = torch.zeros(2, CLASSES, dtype=torch.float64)
        z[0, far - 1], z[1, far] = 4.0, 4.0
        near, away = loss(z, torch.zeros(2, dtype=torch.int64), ALL[:2])
        assert away > near


def test_one_against_the_rest_gives_probabilities() -> None:
    one = settings.BinaryCrossEntropy(type="binary_cross_entropy")
    z = torch.cat([logits(), torch.full((1, CLASSES), -500.0, dtype=torch.float64)])
    p = probabilities(one, z)
    torch.testing.assert_close(p.sum(-1), torch.ones(UNITS + 1, dtype=torch.float64))
    torch.testing.assert_close(p[:UNITS], z[:UNITS].sigmoid() / z[:UNITS].sigmoid().sum(-1, keepdim=True))


# lists

LISTS = torch.tensor([[2.0, 0.0, 1.0, 1.0], [0.5, 3.0, 0.0, 0.0]], dtype=torch.float64)
THERE = torch.tensor([[True, True, True, True], [True, True, False, False]])
SCORES = torch.tensor([[0.3, -1.0, 2.0, 0.7], [1.5, -0.2, 9.0, -7.0]], dtype=torch.float64)


def pairs(hinge: Callable[[float], float]) -> list[float]:
    found = []
    for s, r, n in zip(SCORES.tolist(), LISTS.tolist(), (4, 2), strict=True):
        all_pairs = [hinge(s[i] - s[j]) for i in range(n) for j in range(n) if r[i] > r[j]]
        found.append(sum(all_pairs) / len(all_pairs))
    return found


def listnet() -> list[float]:
    return [
        float(-(softmax(r[:n]) * log_softmax(s[:n])).sum())
        for s, r, n in zip(SCORES.numpy(), LISTS.numpy(), (4, 2), strict=True)
    ]


def listmle() -> list[float]:
    orders = ([0, 2, 3, 1], [1, 0])
    found = []
    for s, order in zip(SCORES.tolist(), orders, strict=True):
        rest = [sum(math.exp(s[j]) for j in order[k:]) for k in range(len(order))]
        found.append(sum(math.log(total) - s[i] for total, i in zip(rest, order, strict=True)) / len(order))
    return found


@pytest.mark.parametrize("method", ["ranknet", "margin", "listnet", "listmle"])
def test_lists(method: Any) -> None:
    made = settings.Ranking(type="ranking", method=method, margin=0.8 if method == "margin" else None)
    expected = {
        "ranknet": lambda: pairs(lambda d: math.log1p(math.exp(-d))),
        "margin": lambda: pairs(lambda d: max(0.0, 0.8 - d)),
        "listnet": listnet,
        "listmle": listmle,
    }[method]()
    assert list_losses(made, SCORES, LISTS, THERE).tolist() == pytest.approx(expected, rel=1e-12)
    scores = SCORES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: list_losses(made, s, LISTS, THERE), scores)
    empty = list_losses(made, scores.float(), LISTS.float(), torch.zeros_like(THERE))
    assert empty.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(empty.sum(), scores)
    assert not gradient.any()


def test_ranking_metrics_are_scikit_learns() -> None:
    dice = np.random.default_rng(0)
    scores = [dice.integers(0, 6, n) / 2 for n in (2, 5, 14, 30)]
    relevance = [dice.integers(0, 4, len(s)).astype(float) for s in scores]
    relevance[0] = np.array([0.0, 1.0])
    found = list_metrics(scores, relevance)
    whole = [ndcg_score([r], [s]) for s, r in zip(scores, relevance, strict=True)]
    ten = [ndcg_score([r], [s], k=10) for s, r in zip(scores, relevance, strict=True)]
    assert found["ndcg"] == pytest.approx(np.mean(whole))
    assert found["ndcg_at_10"] == pytest.approx(np.mean(ten))
    perfect = list_metrics(relevance, relevance)
    assert (perfect["ndcg"], perfect["pair_accuracy"], perfect["mrr"]) == pytest.approx((1.0, 1.0, 1.0))
    assert list_metrics([np.array([3.0, 2.0, 1.0])], [np.array([0.0, 1.0, 2.0])])["mrr"] == pytest.approx(
        1 / 3
    )
