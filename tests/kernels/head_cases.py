"""Inputs of a linear head's cross-entropy; its loss and gradients by this package, and as torch's users write it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from accuracy import hold
from tunesmith_kernels.linear_loss.cross_entropy import linear_cross_entropy

BACKENDS = [
    ("reference", torch.float32),
    ("reference", torch.bfloat16),
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    ("torch", torch.float16),
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
]


@dataclass(frozen=True)
class Case:
    """hidden [..., H], weight [V, H], bias [V] or None, target [...] or [..., V], and the function's options."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    upstream: float = 1.0

    def to(self, dtype: torch.dtype, head: torch.dtype | None = None) -> Case:
        """In the dtype, and so rounded to it; the head in a dtype of its own."""
        head = head or dtype
        bias = None if self.bias is None else self.bias.to(head)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(head), bias=bias)

    def given(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})


def case(
    rows: int, features: int, vocab: int, *, ignored: float = 0.0, bias: bool = True, seed: int = 0
) -> Case:
    """Logits of about unit variance, random targets, a share of them ignored."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, features, generator=random)
    weight = torch.randn(vocab, features, generator=random) / features**0.5
    target = torch.randint(vocab, (rows,), generator=random)
    target[torch.rand(rows, generator=random) < ignored] = -100
    return Case(hidden, weight, target, torch.randn(vocab, generator=random) / 2 if bias else None)


def some_ignored(target: Tensor, ignored: int, seed: int = 1) -> None:
    """Ignores so many of the targets [N], wherever they are."""
    random = torch.Generator().manual_seed(seed)
    target[torch.randperm(len(target), generator=random)[:ignored]] = -100


def certain(rows: int, probability: float, *, features: int = 64, vocab: int = 1003) -> Case:
    """Rows whose target has the given probability: hidden states that point at their target's weight."""
    made = case(rows, features, vocab, bias=False)
    at, own, hidden = made.target[:, None], made.weight[made.target], made.hidden.clone()
    for _ in range(30):  # a step moves the other logits a little, too
        logits = hidden @ made.weight.t()
        others = torch.logsumexp(logits.scatter(1, at, -torch.inf), 1)
        missing = others + math.log(probability / (1 - probability)) - logits.gather(1, at)[:, 0]
        hidden += (missing / own.square().sum(1))[:, None] * own
    return replace(made, hidden=hidden)


def row_losses(logits: Tensor, case: Case) -> Tensor:
    """[N], by torch's cross_entropy; the terms that it lacks are written from their papers, not from our formula.
    logits [N, V]: fp32, or fp64."""
    options, target = case.options, case.target
    soft = target.is_floating_point()
    numbers = logits.dtype
    z = logits * options.get("scale", 1.0)
    if cap := options.get("softcap"):
        z = torch.tanh(z / cap) * cap
    target = target.reshape(-1, z.shape[1]).to(numbers) if soft else target.reshape(-1)
    class_weight = options.get("class_weight")
    loss = F.cross_entropy(
        z,
        target,
        weight=None if class_weight is None else class_weight.to(numbers),
        reduction="none",
        label_smoothing=options.get("label_smoothing", 0.0),
        **({} if soft else {"ignore_index": options.get("ignore_index", -100)}),
    )
    counted = torch.ones(len(z), dtype=torch.bool) if soft else target != options.get("ignore_index", -100)
    if gamma := options.get("focal_gamma"):
        p = torch.softmax(z, 1).gather(1, target.where(counted, 0)[:, None])[:, 0]
        loss = loss * (1 - p) ** gamma
    if zeta := options.get("z_loss"):
        loss = loss + zeta * torch.logsumexp(z, 1) ** 2 * counted
    if (weight := options.get("token_weight")) is not None:
        loss = loss * weight.reshape(-1).to(numbers)
    if (normalizer := options.get("normalizer")) is not None:
        loss = loss / normalizer.to(numbers)
    return loss


def naive(case: Case, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """Loss and gradients with the whole logits: in the case's dtype, all after the product in fp32; fp64 in fp64."""

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
        logits = logits.reshape(-1, logits.shape[-1])
        losses = row_losses(logits if logits.dtype == torch.float64 else logits.float(), case)
        return losses.reshape(hidden.shape[:-1]) if case.options.get("reduction") == "none" else losses.sum()

    return _results(loss, case, upstream)


def fused(case: Case, backend: str | None, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """Loss and gradients by linear_cross_entropy."""

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_cross_entropy(hidden, weight, case.target, bias=bias, **case.options, backend=backend)

    return _results(loss, case, upstream)


def _results(
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor], case: Case, upstream: Tensor | None
) -> dict[str, Tensor]:
    leaves = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    given = {
        name: None if tensor is None else tensor.detach().requires_grad_() for name, tensor in leaves.items()
    }
    assert given["hidden"] is not None
    assert given["weight"] is not None
    value = loss(given["hidden"], given["weight"], given["bias"])
    value.backward(torch.full_like(value, case.upstream) if upstream is None else upstream.to(value))
    found = {"loss": value.detach()}
    for name, tensor in given.items():
        if tensor is not None:
            assert tensor.grad is not None
            found[name] = tensor.grad
    return found


def hold_case(case: Case, backend: str | None, upstream: Tensor | None = None) -> None:
    """The accuracy rule for the loss and every gradient; with their mutants, and the gradients without the target's
    term, which must fail."""
    exact = naive(case.to(torch.float64), upstream)
    own = naive(case, upstream)
    found = fused(case, backend, upstream)
    without = targetless(case, exact, upstream)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        dropped = {} if name == "loss" else {"target term dropped": without[name].to(value.dtype)}
        hold(value, exact[name], own[name], f"{backend} {name}", **dropped)


def targetless(case: Case, exact: dict[str, Tensor], upstream: Tensor | None) -> dict[str, Tensor]:
    """The gradients without what the target's own logit adds to them."""
    made = case.to(torch.float64)

    def logit(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = F.linear(hidden, weight, bias).reshape(-1, weight.shape[0])
        soft = made.target.is_floating_point()
        kept = torch.ones(len(x), dtype=torch.bool) if soft else made.target.reshape(-1) != -100
        at = made.target.reshape(len(x), -1).argmax(1) if soft else made.target.reshape(-1).where(kept, 0)
        # the gradient of each row's loss by its target's logit, times that logit: its gradient is the dropped term
        leaf = x.detach().requires_grad_()
        losses = row_losses(leaf, made)
        scaled = losses.sum() if upstream is None else (losses * upstream.reshape(-1).double()).sum()
        (slope,) = torch.autograd.grad(scaled * (made.upstream if upstream is None else 1.0), leaf)
        return (slope.gather(1, at[:, None])[:, 0] * x.gather(1, at[:, None])[:, 0] * kept).sum()

    own = _results(logit, replace(made, upstream=1.0), None)
    return {name: exact[name] - own[name] for name in exact if name != "loss"}
