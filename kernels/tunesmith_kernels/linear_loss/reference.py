"""Linear cross-entropy as one writes it down: the whole logits, autograd. What the other paths are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith_kernels.linear_loss.chunks import Problem
from tunesmith_kernels.linear_loss.rows import RowOutputs


def losses(problem: Problem) -> tuple[Tensor, RowOutputs]:
    """The rows' losses [N] with gradient, and the outputs; ignored rows are 0. Logits are hidden's dtype, all that
    follows is fp32 (fp64 for fp64)."""
    options, target = problem.options, problem.target
    x = torch.nn.functional.linear(
        problem.hidden,
        problem.weight.to(problem.hidden.dtype),
        None if problem.bias is None else problem.bias.to(problem.hidden.dtype),
    )
    z = (x if x.dtype == torch.float64 else x.float()) * options.scale
    if options.softcap:
        z = options.softcap * torch.tanh(z / options.softcap)
    lse = torch.logsumexp(z, dim=1)
    log_s = torch.log_softmax(z, dim=1)  # not z − lse, which rounds at the size of lse
    soft = target.is_floating_point()
    kept = torch.ones_like(lse, dtype=torch.bool) if soft else target != problem.ignore_index
    label = target.argmax(dim=1) if soft else target.where(kept, 0)
    keep, share = 1 - options.label_smoothing, options.label_smoothing / z.shape[1]
    w = z.new_ones(z.shape[1]) if problem.class_weight is None else problem.class_weight
    if soft:
        log_prob = _dot(target, log_s)
        ce = -_dot(w * (keep * target + share), log_s)
    else:
        log_prob = log_s.gather(1, label[:, None])[:, 0]
        ce = -keep * _product(w[label], log_prob) - _dot(share * w, log_s)
    if options.focal_gamma:
        # 1 − p where p is small: torch's derivative of expm1 is expm1 + 1, which cancels there
        miss = torch.where(log_prob > -0.5, -torch.expm1(log_prob), 1 - log_prob.exp())
        # 0 has no slope below γ = 1: the limit is 0 where the row is certain
        ce = ce * miss.clamp_min(torch.finfo(miss.dtype).tiny) ** options.focal_gamma
    loss = ce + options.z_loss * lse.square()
    if problem.token_weight is not None:
        loss = loss * problem.token_weight
    with torch.no_grad():
        correct = z.gather(1, label[:, None])[:, 0] >= z.amax(dim=1)
        entropy = -_dot(log_s.exp(), log_s)
        values = [value.detach().where(kept, 0) for value in (loss, log_prob, entropy, lse)]
        outputs = RowOutputs(values[0], values[1], values[2], values[3], correct & kept)
    return loss.where(kept, 0), outputs


def _dot(a: Tensor, log_s: Tensor) -> Tensor:
    return _product(a, log_s).sum(dim=1)


def _product(a: Tensor, log_s: Tensor) -> Tensor:
    """a·log s, with 0·(−inf) = 0 and no gradient there."""
    return a * log_s.where(a != 0, 0.0)
