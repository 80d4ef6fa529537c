"""Inputs of a linear distillation; its loss and gradients by this package, and as torch's users write it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from accuracy import hold
from tunesmith_kernels.linear_loss.distillation import (
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    linear_distillation,
)

BACKENDS = [
    ("reference", torch.float32),
    ("reference", torch.bfloat16),
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    ("torch", torch.float16),
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
]
DIVERGENCES: dict[str, dict[str, Any]] = {
    "forward_kl": {"divergence": "forward_kl"},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "beta": 0.1},
}
TEACHERS = ("hidden", "logits", "top k with tail", "top k alone")


@dataclass(frozen=True)
class Case:
    """The student's hidden [..., H], weight [V, H], bias [V] or None; target [...] or None; the function's options."""

    hidden: Tensor
    weight: Tensor
    teacher: TeacherHidden | TeacherLogits | TeacherTopK
    target: Tensor | None = None
    bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    upstream: float = 1.0

    def to(self, dtype: torch.dtype) -> Case:
        """In the dtype, and so rounded to it; log-probabilities stay fp32 but beside fp64."""
        numbers = {f.name: getattr(self.teacher, f.name) for f in fields(self.teacher)}
        own = torch.float64 if dtype == torch.float64 else torch.float32
        moved = {
            name: value.to(own if name == "log_probs" else dtype)
            for name, value in numbers.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        bias = None if self.bias is None else self.bias.to(dtype)
        student = {"hidden": self.hidden.to(dtype), "weight": self.weight.to(dtype), "bias": bias}
        return replace(self, teacher=replace(self.teacher, **moved), **student)

    def given(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})


def case(
    rows: int,
    features: int,
    vocab: int,
    *,
    teacher: str = "hidden",
    ignored: float = 0.0,
    bias: bool = True,
    size: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Case:
    """The student's logits of standard deviation `size`, the teacher's half as large again; CE beside the divergence; a
    share of the targets is ignored."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, features, generator=random)
    weight = size * torch.randn(vocab, features, generator=random) / features**0.5
    wide = features + 9
    states = torch.randn(rows, wide, generator=random)
    head = 1.5 * size * torch.randn(vocab, wide, generator=random) / wide**0.5
    target = torch.randint(vocab, (rows,), generator=random)
    target[torch.rand(rows, generator=random) < ignored] = -100
    own = torch.randn(vocab, generator=random) / 2 if bias else None
    options = {"ce_weight": 0.3, "kd_weight": 0.9, **options}
    temperature = options.get("temperature", 1.0)
    return Case(
        hidden,
        weight,
        teacher_of(teacher, states, head, None if own is None else own.clone(), temperature),
        target,
        own,
        options,
    )


def teacher_of(
    kind: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, k: int = 7
) -> TeacherHidden | TeacherLogits | TeacherTopK:
    """The same teacher in each of its forms. k: of its classes, where it is known by some alone."""
    if kind == "hidden":
        return TeacherHidden(hidden, weight, bias)
    logits = F.linear(hidden, weight, bias)
    if kind == "logits":
        return TeacherLogits(logits)
    log_probs, indices = torch.log_softmax(logits / temperature, -1).topk(min(k, weight.shape[0]))
    return TeacherTopK(indices, log_probs, tail=kind == "top k with tail")


def row_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, case: Case, probabilities: bool = False
) -> Tensor:
    """[N], with the whole logits and torch's kl_div, of log-probabilities or of probabilities; all after the products
    in fp32 (fp64 in fp64)."""
    options, teacher = case.options, case.teacher
    hidden = hidden.reshape(-1, hidden.shape[-1])
    n = teacher.vocab or weight.shape[0]
    z = _logits(hidden, weight, bias, options.get("softcap"), options.get("scale", 1.0))[:, :n]
    temperature = options.get("temperature", 1.0)
    log_q = torch.log_softmax(z / temperature, 1)
    if isinstance(teacher, TeacherTopK):
        log_p, log_q = _few(teacher, log_q)
    else:
        log_p = torch.log_softmax(_teachers(teacher, hidden)[:, :n].to(z.dtype) / temperature, 1)
    kd = temperature**2 * _divergence(log_p, log_q, options, probabilities)
    loss = options.get("kd_weight", 1.0) * kd
    if case.target is not None:
        target = case.target.reshape(-1)
        counted = target != options.get("ignore_index", -100)
        ce = F.cross_entropy(z, target.where(counted, -100), reduction="none")
        loss = (loss + options.get("ce_weight", 0.0) * ce).where(counted, 0)
    if (token_weight := options.get("token_weight")) is not None:
        loss = loss * token_weight.reshape(-1).to(z.dtype)
    if (normalizer := options.get("normalizer")) is not None:
        loss = loss / normalizer.to(z.dtype)
    return loss


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None, scale: float) -> Tensor:
    x = F.linear(hidden, weight, bias)
    z = (x if x.dtype == torch.float64 else x.float()) * scale
    return torch.tanh(z / cap) * cap if cap else z


def _teachers(teacher: TeacherHidden | TeacherLogits, hidden: Tensor) -> Tensor:
    if isinstance(teacher, TeacherLogits):
        logits = teacher.logits.reshape(len(hidden), -1)
        return logits if logits.dtype == torch.float64 else logits.float()
    states = teacher.hidden.reshape(len(hidden), -1)
    return _logits(states, teacher.weight, teacher.bias, teacher.softcap, teacher.scale)


def _few(teacher: TeacherTopK, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log q of the k classes, and of the rest; or of the k classes as if there were no more."""
    k = teacher.indices.shape[-1]
    indices, log_p = teacher.indices.reshape(-1, k), teacher.log_probs.reshape(-1, k).to(log_q.dtype)
    few = log_q.gather(1, indices)
    if not teacher.tail:
        return torch.log_softmax(log_p, 1), torch.log_softmax(few, 1)
    if k == log_q.shape[1]:
        return log_p, few
    rest_p = (1 - log_p.double().exp().sum(1, keepdim=True)).clamp_min(2**-24).log().to(log_p.dtype)
    rest_q = torch.logsumexp(log_q.scatter(1, indices, -math.inf), 1, keepdim=True)
    return torch.cat([log_p, rest_p], 1), torch.cat([few, rest_q], 1)


def _divergence(log_p: Tensor, log_q: Tensor, options: dict[str, Any], probabilities: bool) -> Tensor:
    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        if probabilities:
            return F.kl_div(log_b, log_a.exp(), reduction="none").sum(1)
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(1)

    match options.get("divergence", "forward_kl"):
        case "forward_kl":
            return kl(log_p, log_q)
        case "reverse_kl":
            return kl(log_q, log_p)
        case _:
            beta = options.get("beta", 0.5)
            log_m = torch.logsumexp(torch.stack([log_p + math.log(beta), log_q + math.log(1 - beta)]), dim=0)
            return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def naive(case: Case, upstream: Tensor | None = None, probabilities: bool = False) -> dict[str, Tensor]:
    """Loss and gradients with the whole logits, in the case's dtype."""

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        losses = row_losses(hidden, weight, bias, case, probabilities)
        return losses.reshape(hidden.shape[:-1]) if case.options.get("reduction") == "none" else losses.sum()

    return _results(loss, case, upstream)


def distilled(case: Case, backend: str | None, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """Loss and gradients by linear_distillation."""

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        teacher, options = case.teacher, case.options
        return linear_distillation(
            hidden, weight, case.target, teacher=teacher, bias=bias, **options, backend=backend
        )

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


def wrong_options(case: Case) -> dict[str, dict[str, Any]]:
    """Options that make wrong results of the case's, by the mistake."""
    options = case.options
    divergence, temperature = options.get("divergence", "forward_kl"), options.get("temperature", 1.0)
    kd_weight = options.get("kd_weight", 1.0)
    wrong: dict[str, dict[str, Any]] = {"no divergence": {"kd_weight": 0.0}}
    if temperature != 1:
        wrong["no T²"] = {"kd_weight": kd_weight / temperature**2}
    if divergence == "jsd":
        if options.get("beta", 0.5) != 0.5:
            wrong["β swapped"] = {"beta": 1 - options["beta"]}
    else:
        swapped = {"forward_kl": "reverse_kl", "reverse_kl": "forward_kl"}[divergence]
        wrong["direction swapped"] = {"divergence": swapped}
    if case.target is not None and options.get("ce_weight"):
        wrong["no cross-entropy"] = {"ce_weight": 0.0}
    return wrong


def owns(case: Case, exact: dict[str, Tensor], upstream: Tensor | None = None) -> dict[str, Tensor]:
    """What torch's own operators give, number by number in the worse of the two ways of its kl_div: where few numbers
    are, one way's greatest error may be small by luck."""
    own = naive(case, upstream)
    for name, value in naive(case, upstream, probabilities=True).items():
        nearer = (own[name].double() - exact[name]).abs() < (value.double() - exact[name]).abs()
        own[name] = torch.where(nearer, value, own[name])
    return own


def hold_case(
    case: Case, backend: str | None, upstream: Tensor | None = None, *, alike: bool = False
) -> None:
    """The accuracy rule for the loss and every gradient, and their mutants, which must fail. alike: student and teacher
    are, so that a mutant in the divergence itself can't be told."""
    exact_case = case.to(torch.float64)
    exact, found = naive(exact_case, upstream), distilled(case, backend, upstream)
    own = owns(case, exact, upstream)
    wrong = {} if alike else wrong_options(case)
    mutants = {name: naive(exact_case.given(**options), upstream) for name, options in wrong.items()}
    assert found.keys() == exact.keys()
    for name, value in found.items():
        dropped = {mistake: mutant[name].to(value.dtype) for mistake, mutant in mutants.items()}
        if name == "loss" and value.ndim == 0 and case.hidden.dtype != torch.float32:
            dropped.pop("β swapped", None)  # of few rows the sum of JSD hardly changes; the gradients do
        hold(value, exact[name], own[name], f"{backend} {name}", **dropped)
