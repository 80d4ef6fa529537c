"""One chunk of rows of a linear distillation: what a row kernel is given, what it writes, and its plain-torch form.

For a row with the student's logits z and the teacher's t, each after its own scale and soft-cap (see `rows`), at
temperature T:

    p = softmax(t/T),  q = softmax(z/T),  s = softmax(z)
    forward_kl   D = Σ p·(log p − log q)                            Hinton et al. 2015, less the teacher's entropy
    reverse_kl   D = Σ q·(log q − log p)                            Gu et al. 2024 (MiniLLM)
    jsd          D = β·KL(p‖m) + (1−β)·KL(q‖m),  m = β·p + (1−β)·q  Agarwal et al. 2024 (GKD), 0 < β < 1
    loss = token_weight·(kd_weight·T²·D + ce_weight·CE),  CE = −log s_target

so that JSD/β → forward KL as β → 0 and JSD/(1−β) → reverse KL as β → 1: the ends themselves, where JSD is 0, are not
defined. With g = ∂D/∂(z/T):

    forward_kl   g_v = q_v − p_v
    reverse_kl   g_v = q_v·(log q_v − log p_v − D)
    jsd          g_v = (1−β)·q_v·(log(q_v/m_v) − KL(q‖m))
    ∂loss/∂z_v = token_weight·(kd_weight·T·g_v + ce_weight·(s_v − 1(v = target)))

log(q/m) = −log1p(β·expm1(d)) with d = log p − log q (and for p likewise with −d), which loses nothing where p ≈ q.

A teacher known by its top k classes gives k probabilities. With the tail, p and q are distributions over k + 1
buckets: the k classes, and one of all others, with p_tail = max(1 − Σp, 2⁻²⁴) (none where k = V) and q_tail = Σ q over
the classes that are not among the k; without it, both are normalised over the k classes alone. D and g are those above
over the buckets (forward KL: g_v = q_v·Σp − p_v, where the k probabilities add up to more than 1); the tail's own g is
shared among its classes in proportion to q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
TAIL_FLOOR = 2.0**-24  # fp32 log-probabilities do not tell a smaller remainder from 0


@dataclass(frozen=True)
class DistillationOptions:
    """The numbers of the formula above; a softcap of 0 means none."""

    divergence: Divergence
    beta: float
    temperature: float
    kd_weight: float
    ce_weight: float
    softcap: float
    scale: float
    teacher_softcap: float
    teacher_scale: float
    tail: bool


@dataclass(frozen=True)
class DistillationInputs:
    """What belongs to the rows of a chunk. All on the logits' device, contiguous.

    teacher_logits: [rows, V], fp32, bf16 or fp16, not written to; or instead of them indices: int64 [rows, k], in
        0..V−1 and different within a row, and log_probs: fp32 [rows, k].
    target: int64 [rows] in 0..V−1; None: no cross-entropy. token_weight: fp32 [rows].
    gradient_factor: fp32 [rows], multiplies a row's gradient (not its loss); it holds token_weight already. None: no
        gradient is wanted.
    """

    teacher_logits: Tensor | None
    indices: Tensor | None
    log_probs: Tensor | None
    target: Tensor | None
    token_weight: Tensor | None
    gradient_factor: Tensor | None


@dataclass(frozen=True)
class DistillationOutputs:
    """Written by a row kernel, contiguous [rows].

    loss: fp32, with token_weight. kd: fp32, T²·D. log_prob: fp32, log s_target (0 without a target). entropy: fp32, of
    s. agree: bool, whether a class is the likeliest of both.
    """

    loss: Tensor
    kd: Tensor
    log_prob: Tensor
    entropy: Tensor
    agree: Tensor


DISTILLATION_OUTPUTS = ("loss", "kd", "log_prob", "entropy", "agree")


class DistillationKernel(Protocol):
    def __call__(
        self,
        logits: Tensor,
        inputs: DistillationInputs,
        options: DistillationOptions,
        outputs: DistillationOutputs,
    ) -> None:
        """logits: the student's, before scale and soft-cap, [rows, V], contiguous, fp32, bf16 or fp16. Where
        `gradient_factor` is given they are overwritten with gradient_factor·∂(loss/token_weight)/∂logits in their own
        dtype, rounded once; otherwise they may be left in any state. A row with a NaN or +inf among its logits gets a
        loss that is not finite. A class that both have at −inf adds nothing."""
        ...


def torch_distillation_rows(
    logits: Tensor, inputs: DistillationInputs, options: DistillationOptions, outputs: DistillationOutputs
) -> None:
    """The row kernel in torch's own operators, on any device: right, and slower than a compiled one."""
    z = transformed(logits.float(), options.softcap, options.scale)
    log_s = torch.log_softmax(z, dim=1)
    log_q = log_s if options.temperature == 1 else torch.log_softmax(z / options.temperature, dim=1)
    top = z == z.amax(dim=1, keepdim=True)
    if inputs.teacher_logits is not None:
        t = transformed(inputs.teacher_logits.float(), options.teacher_softcap, options.teacher_scale)
        agree = (top & (t == t.amax(dim=1, keepdim=True))).any(dim=1)
        log_p = torch.log_softmax(t / options.temperature, dim=1)
        divergence, gradient = _divergence(log_p, log_q, options)
    else:
        assert inputs.indices is not None
        assert inputs.log_probs is not None
        likeliest = inputs.log_probs == inputs.log_probs.amax(dim=1, keepdim=True)
        agree = (likeliest & top.gather(1, inputs.indices)).any(dim=1)
        log_p, log_q, outside = buckets(log_q, inputs.indices, inputs.log_probs, options.tail)
        divergence, of_buckets = _divergence(log_p, log_q, options)
        gradient = torch.zeros_like(z) if outside is None else outside.exp_().mul_(of_buckets[:, -1:])
        gradient.scatter_(1, inputs.indices, of_buckets[:, : inputs.indices.shape[1]])

    kd = options.temperature**2 * divergence
    loss = options.kd_weight * kd if options.kd_weight else torch.zeros_like(kd)
    log_prob = torch.zeros_like(kd)
    if inputs.target is not None:
        log_prob = log_s.gather(1, inputs.target[:, None])[:, 0]
        if options.ce_weight:
            loss = loss - options.ce_weight * log_prob
    outputs.loss.copy_(loss if inputs.token_weight is None else loss * inputs.token_weight)
    outputs.kd.copy_(kd)
    outputs.log_prob.copy_(log_prob)
    outputs.agree.copy_(agree)
    s = log_s.exp()
    outputs.entropy.copy_(-torch.where(s == 0, 0.0, s * log_s).sum(dim=1))
    if inputs.gradient_factor is None:
        return

    gradient *= options.kd_weight * options.temperature
    if options.ce_weight:
        assert inputs.target is not None
        at = inputs.target[:, None]
        # s − 1 without cancellation where the row is nearly certain
        s.scatter_(1, at, torch.expm1(log_prob)[:, None])
        gradient.add_(s, alpha=options.ce_weight)
    if options.softcap:
        gradient *= 1 - (z / options.softcap).square_()
    gradient *= (inputs.gradient_factor * options.scale)[:, None]
    logits.copy_(gradient)


def transformed(logits: Tensor, softcap: float, scale: float) -> Tensor:
    """cap·tanh(scale·logits/cap), or scale·logits without a cap."""
    z = logits * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def buckets(
    log_q: Tensor, indices: Tensor, log_probs: Tensor, tail: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """log p and log q over the buckets of a top-k teacher [rows, k or k + 1]; and for the tail the logarithm of each
    class's share in it [rows, V], −inf for the k classes. log_q: of the student, over all classes [rows, V]."""
    inside = log_q.gather(1, indices)
    if not tail:
        return torch.log_softmax(log_probs, dim=1), torch.log_softmax(inside, dim=1), None
    if indices.shape[1] == log_q.shape[1]:
        return log_probs, inside, None
    others = log_q.scatter(1, indices, -math.inf)
    rest_q = torch.logsumexp(others, dim=1, keepdim=True)
    rest_p = (1 - log_probs.double().exp().sum(dim=1, keepdim=True)).clamp_min(TAIL_FLOOR).log()
    log_p = torch.cat([log_probs, rest_p.to(log_probs.dtype)], dim=1)
    return log_p, torch.cat([inside, rest_q], dim=1), others - rest_q


def _divergence(log_p: Tensor, log_q: Tensor, options: DistillationOptions) -> tuple[Tensor, Tensor]:
    """D [rows] and g [rows, classes] of the formula."""
    q = log_q.exp()
    d = torch.where(log_p == log_q, 0.0, log_p - log_q)  # −inf of both: 0
    match options.divergence:
        case "forward_kl":
            p = log_p.exp()
            divergence = torch.where(p == 0, 0.0, p * d).sum(dim=1)
            return divergence, (q * p.sum(dim=1, keepdim=True)).sub_(p)
        case "reverse_kl":
            divergence = torch.where(q == 0, 0.0, -q * d).sum(dim=1)
            return divergence, torch.where(q == 0, 0.0, q * (-d - divergence[:, None]))
        case "jsd":
            p, beta = log_p.exp(), options.beta
            up = d >= 0
            nearer = -torch.log1p(torch.expm1(-d.abs()) * torch.where(up, 1 - beta, beta))
            of_p, of_q = torch.where(up, nearer, nearer + d), torch.where(up, nearer - d, nearer)
            from_q = torch.where(q == 0, 0.0, q * of_q).sum(dim=1)
            from_p = torch.where(p == 0, 0.0, p * of_p).sum(dim=1)
            gradient = torch.where(q == 0, 0.0, (1 - beta) * q * (of_q - from_q[:, None]))
            return beta * from_p + (1 - beta) * from_q, gradient
