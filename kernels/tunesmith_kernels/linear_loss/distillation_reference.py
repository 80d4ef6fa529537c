"""Linear distillation as one writes it down: the whole logits, autograd. What the other paths are held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from tunesmith_kernels.linear_loss.distillation_chunks import DistillationProblem, Teacher
from tunesmith_kernels.linear_loss.distillation_rows import (
    DistillationOptions,
    DistillationOutputs,
    buckets,
    transformed,
)


def distillation_losses(problem: DistillationProblem) -> tuple[Tensor, DistillationOutputs]:
    """The rows' losses [N] with gradient, and the outputs; ignored rows are 0. The logits are in hidden's dtype, all
    that follows is fp32 (fp64 for fp64)."""
    options, target, teacher = problem.options, problem.target, problem.teacher
    x = _product(problem.hidden, problem.weight, problem.bias)
    z = transformed(_wide(x), options.softcap, options.scale)
    log_s, log_q = torch.log_softmax(z, dim=1), torch.log_softmax(z / options.temperature, dim=1)
    top = z == z.amax(dim=1, keepdim=True)
    if teacher.log_probs is not None:
        assert teacher.indices is not None
        log_p, log_q, _ = buckets(log_q, teacher.indices, teacher.log_probs.to(z.dtype), options.tail)
        likeliest = teacher.log_probs == teacher.log_probs.amax(dim=1, keepdim=True)
        agree = (likeliest & top.gather(1, teacher.indices)).any(dim=1)
    else:
        t = transformed(_wide(_teacher_logits(teacher)), options.teacher_softcap, options.teacher_scale)
        log_p = torch.log_softmax(t.to(torch.promote_types(t.dtype, z.dtype)) / options.temperature, dim=1)
        agree = (top & (t == t.amax(dim=1, keepdim=True))).any(dim=1)
    kd = options.temperature**2 * _divergence(log_p, log_q, options)
    loss = options.kd_weight * kd if options.kd_weight else torch.zeros_like(kd)
    log_prob, kept = torch.zeros_like(kd), torch.ones_like(agree)
    if target is not None:
        kept = target != problem.ignore_index
        log_prob = log_s.gather(1, target.where(kept, 0)[:, None])[:, 0]
        if options.ce_weight:
            loss = loss - options.ce_weight * log_prob
    if problem.token_weight is not None:
        loss = loss * problem.token_weight
    entropy = -_expected(log_s.detach(), log_s.detach())
    values = [value.detach().where(kept, 0) for value in (loss, kd, log_prob, entropy)]
    outputs = DistillationOutputs(values[0], values[1], values[2], values[3], agree & kept)
    return loss.where(kept, 0), outputs


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))


def _teacher_logits(teacher: Teacher) -> Tensor:
    if teacher.logits is not None:
        return teacher.logits
    assert teacher.hidden is not None
    assert teacher.weight is not None
    return _product(teacher.hidden, teacher.weight, teacher.bias)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _divergence(log_p: Tensor, log_q: Tensor, options: DistillationOptions) -> Tensor:
    match options.divergence:
        case "forward_kl":
            return _kl(log_p, log_q)
        case "reverse_kl":
            return _kl(log_q, log_p)
        case "jsd":
            beta = options.beta
            none = (log_p == -math.inf) & (log_q == -math.inf)  # logaddexp has no gradient there
            of_p, of_q = log_p.masked_fill(none, 0.0), log_q.masked_fill(none, 0.0)
            log_m = torch.logaddexp(of_p + math.log(beta), of_q + math.log1p(-beta))
            return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p·(log p − log q) by row."""
    none = log_p == -math.inf
    return _expected(log_p, log_p.masked_fill(none, 0.0) - log_q.masked_fill(none, 0.0))


def _expected(log_p: Tensor, value: Tensor) -> Tensor:
    """Σ p·value by row, with 0·∞ = 0."""
    return (log_p.exp() * value.masked_fill(log_p == -math.inf, 0.0)).sum(dim=1)
