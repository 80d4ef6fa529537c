"""Linear cross-entropy's options, alone and together, in every backend; its statistics; what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from accuracy import hold
from head_cases import BACKENDS, Case, case, certain, fused, hold_case, naive, row_losses
from tunesmith_kernels import Stats, linear_cross_entropy

ROWS, FEATURES, VOCAB = 250, 40, 303
in_every_backend = pytest.mark.parametrize(("backend", "dtype"), BACKENDS)


def _positive(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) * 2


def _soft(rows: int = ROWS, vocab: int = VOCAB) -> Tensor:
    return torch.softmax(2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(4)), 1)


HARD: dict[str, dict[str, Any]] = {
    "class weights": {"class_weight": _positive(VOCAB)},
    "class weights of zero": {"class_weight": _positive(VOCAB).round()},
    "token weights": {"token_weight": _positive(ROWS) - 0.5},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing and class weights": {"label_smoothing": 0.3, "class_weight": _positive(VOCAB)},
    "z-loss": {"z_loss": 1e-2},
    "focal": {"focal_gamma": 2.0},
    "focal below 1": {"focal_gamma": 0.5},
    "soft-cap": {"softcap": 2.0},
    "scale": {"scale": -1.7},
    "soft-cap and scale": {"softcap": 3.0, "scale": 2.5},
    "normalizer": {"normalizer": torch.tensor(41.5)},
}
HARD["all"] = {
    **{name: value for options in HARD.values() for name, value in options.items()},
    "label_smoothing": 0.1,
    "focal_gamma": 1.5,
    "scale": 1.3,
}
SOFT = {name: given for name, given in HARD.items() if "focal_gamma" not in given} | {
    "all": {name: value for name, value in HARD["all"].items() if name != "focal_gamma"},
    "nothing": {},
}


@in_every_backend
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("options", HARD.values(), ids=HARD)
def test_options(options: dict[str, Any], reduction: str, backend: str, dtype: torch.dtype) -> None:
    made = case(ROWS, FEATURES, VOCAB, ignored=0.2).given(reduction=reduction, **options).to(dtype)
    upstream = None if reduction == "sum" else torch.randn(ROWS, generator=torch.Generator().manual_seed(5))
    hold_case(made, backend, upstream)


@in_every_backend
@pytest.mark.parametrize("options", SOFT.values(), ids=SOFT)
def test_options_with_soft_targets(options: dict[str, Any], backend: str, dtype: torch.dtype) -> None:
    made = replace(case(ROWS, FEATURES, VOCAB), target=_soft()).given(**options)
    hold_case(made.to(dtype), backend)


@in_every_backend
@pytest.mark.parametrize(
    "dropped",
    ["class_weight", "token_weight", "label_smoothing", "z_loss", "focal_gamma", "softcap", "scale"],
)
def test_no_option_can_be_dropped(dropped: str, backend: str, dtype: torch.dtype) -> None:
    """Each of all the options together: without it, loss and gradients fail the rule."""
    made = case(ROWS, FEATURES, VOCAB, ignored=0.2).given(**HARD["all"]).to(dtype)
    without = replace(made, options={name: v for name, v in made.options.items() if name != dropped})
    exact, own = naive(made.to(torch.float64)), naive(made)
    found, lacking = fused(made, backend), fused(without, backend)
    for name, value in found.items():
        hold(value, exact[name], own[name], name, **{dropped: lacking[name]})


@in_every_backend
def test_z_loss_has_a_gradient(backend: str, dtype: torch.dtype) -> None:
    """Where nothing else has one: every class weight is 0."""
    made = case(ROWS, FEATURES, VOCAB).given(z_loss=0.1, class_weight=torch.zeros(VOCAB)).to(dtype)
    exact, own, found = naive(made.to(torch.float64)), naive(made), fused(made, backend)
    for name, value in found.items():
        hold(value, exact[name], own[name], name)


@in_every_backend
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_of_certain_rows(gamma: float, backend: str, dtype: torch.dtype) -> None:
    """(1 − p)^γ, where 1 − p is 1e-3 and torch's own 1 − softmax has cancelled; 1e-2 in fp16, which has no gradients
    of 1e-9."""
    made = certain(ROWS, 0.99 if dtype == torch.float16 else 0.999).given(focal_gamma=gamma).to(dtype)
    hold_case(replace(made, upstream=16.0), backend)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_where_p_is_1(gamma: float, backend: str) -> None:
    """The limit, not 0 · ∞."""
    made = Case(
        torch.ones(3, 2), torch.tensor([[90.0, 90.0], [-90.0, 0.0], [0.0, -90.0]]), torch.tensor([0, 0, 1])
    )
    found = fused(
        replace(made, hidden=made.hidden[:2], target=made.target[:2]).given(focal_gamma=gamma), backend
    )
    assert all(torch.equal(value, torch.zeros_like(value)) for value in found.values())


@in_every_backend
@pytest.mark.parametrize("options", ["scale", "z-loss", "focal", "class weights", "soft targets"])
def test_masked_vocabulary(options: str, backend: str, dtype: torch.dtype) -> None:
    """A bias of −inf, on padding of the vocabulary: no probability, no gradient, no NaN."""
    made = case(ROWS, FEATURES, VOCAB, ignored=0.2).to(dtype)
    made.bias[VOCAB - 20 :] = -torch.inf
    made.target[made.target >= VOCAB - 20] = 0
    if options == "soft targets":
        target = _soft()
        target[:, VOCAB - 20 :] = 0
        made = replace(made, target=target)
    else:
        made = made.given(**{**HARD[options], **({"scale": 1.7} if options == "scale" else {})})
    exact, own, found = _masked(made.to(torch.float64)), _masked(made), fused(made, backend)
    for name, value in found.items():
        hold(value, exact[name], own[name], name)
    assert not found["weight"][VOCAB - 20 :].any()
    assert not found["bias"][VOCAB - 20 :].any()


def _masked(made: Case) -> dict[str, Tensor]:
    """`naive` over the classes that are not masked: torch's own cross_entropy of soft targets gives 0 · −inf."""
    keep = VOCAB - 20
    target = made.target[:, :keep] if made.target.is_floating_point() else made.target
    options = {name: v[:keep] if name == "class_weight" else v for name, v in made.options.items()}
    found = naive(Case(made.hidden, made.weight[:keep], target, made.bias[:keep], options))
    return {
        name: F.pad(v, (0,) * (2 * v.ndim - 1) + (20,)) if name in ("weight", "bias") else v
        for name, v in found.items()
    }


@in_every_backend
def test_one_hot_soft_targets_are_class_targets(backend: str, dtype: torch.dtype) -> None:
    made = case(ROWS, FEATURES, VOCAB).given(label_smoothing=0.1).to(dtype)
    hot = replace(made, target=F.one_hot(made.target, VOCAB).float())
    exact, own, found = naive(made.to(torch.float64)), naive(made), fused(hot, backend)
    for name, value in found.items():
        hold(value, exact[name], own[name], name)


@in_every_backend
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_statistics(reduction: str, soft: bool, backend: str, dtype: torch.dtype) -> None:
    """Per row, of the predictions as they are: scale and cap count, weights and smoothing don't."""
    made = case(ROWS, FEATURES, VOCAB, ignored=0.0 if soft else 0.3)
    options = {**SOFT["all"], "reduction": reduction}
    made = replace(made, target=_soft() if soft else made.target).given(**options).to(dtype)
    plain = made.given(class_weight=None, token_weight=None, label_smoothing=0.0, z_loss=0.0, normalizer=None)

    def expected(made: Case) -> dict[str, Tensor]:
        logits = F.linear(made.hidden, made.weight, made.bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        z = 3.0 * torch.tanh(1.3 * logits / 3.0)
        log_s = torch.log_softmax(z, 1)
        counted = torch.ones(ROWS, dtype=torch.bool) if soft else made.target != -100
        of = {
            "log_prob": -row_losses(logits, made),
            "lse": torch.logsumexp(z, 1),
            "entropy": -(log_s.exp() * log_s).sum(1),
        }
        return {name: value * counted for name, value in of.items()}

    exact, own = expected(plain.to(torch.float64)), expected(plain)
    hidden = made.hidden.requires_grad_()
    loss, stats = linear_cross_entropy(
        hidden, made.weight, made.target, bias=made.bias, **made.options, backend=backend, return_stats=True
    )
    assert isinstance(stats, Stats)
    assert loss.requires_grad
    for name in exact:
        value = getattr(stats, name)
        assert value.dtype == torch.float32
        assert not value.requires_grad
        hold(value, exact[name], own[name], name)
    counted = torch.ones(ROWS, dtype=torch.bool) if soft else made.target != -100
    assert torch.equal(stats.counted, counted)
    label = made.target.argmax(1) if soft else made.target
    logits = F.linear(made.hidden, made.weight, made.bias).float()
    sure = logits.topk(2, dim=1).values.diff(dim=1)[:, 0].abs() > 0.02
    assert sure.sum() > ROWS / 2
    assert torch.equal(stats.correct[sure], ((logits.argmax(1) == label) & counted)[sure])


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_correct_means_that_no_class_is_likelier(backend: str) -> None:
    """A tie counts; leading dimensions are kept."""
    weight = torch.tensor([[1.0], [1.0], [0.5]])
    target = torch.tensor([[0, 1], [2, -100]])
    _, stats = linear_cross_entropy(torch.ones(2, 2, 1), weight, target, backend=backend, return_stats=True)
    assert stats.correct.tolist() == [[True, True], [False, False]]
    assert stats.counted.tolist() == [[True, True], [True, False]]
    assert all(value.shape == (2, 2) for value in stats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_a_logit_that_is_not_finite_shows(backend: str, bad: float, dtype: torch.dtype) -> None:
    """In its own row's loss and gradient, and in no other's."""
    made = case(ROWS, FEATURES, VOCAB, bias=False).given(reduction="none").to(dtype)
    made.hidden[7, 3] = bad
    found = fused(made, backend)
    assert (~found["loss"].isfinite()).nonzero().tolist() == [[7]]
    assert (~found["hidden"].isfinite().all(1)).nonzero().tolist() == [[7]]
    soft = replace(made, target=torch.full((ROWS, VOCAB), torch.nan))
    assert fused(soft, backend)["loss"].isnan().all()
