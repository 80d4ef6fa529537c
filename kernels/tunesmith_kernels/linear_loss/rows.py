"""One chunk of rows of a linear cross-entropy: what a row kernel is given, what it writes, and its plain-torch form.

For a row with logits x = hidden·weightᵀ + bias, and z = cap·tanh(scale·x / cap) (without a cap, z = scale·x):

    s_v   = exp(z_v) / Σ exp(z)                                     softmax
    a_v   = w_v·((1−ε)·q_v + ε/V)                                   q: one-hot of the target, or the soft target
    CE    = Σ_v a_v·(lse − z_v),  lse = log Σ exp(z)                as torch.nn.functional.cross_entropy
    F     = (1 − s_target)^γ                                        focal loss, Lin et al. 2017
    loss  = token_weight·(F·CE + ζ·lse²)                            ζ: z-loss, Chowdhery et al. 2022 (PaLM)

    ∂loss/∂z_v = token_weight·[(F·A + K + 2ζ·lse)·s_v − F·a_v − K·1(v = target)]
    A = Σ_v a_v,  K = γ·(1−s_target)^(γ−1)·s_target·CE,  ∂z_v/∂x_v = scale·(1 − (z_v/cap)²)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowOptions:
    """The numbers of the formula above; 0 turns a term off, a softcap of 0 means none."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    focal_gamma: float = 0.0
    softcap: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class RowInputs:
    """What belongs to the rows of a chunk. All on the logits' device, contiguous.

    target: int64 [rows] in 0..V−1, or fp32 [rows, V], a distribution per row.
    class_weight: fp32 [V]; token_weight: fp32 [rows].
    gradient_factor: fp32 [rows], multiplies a row's gradient (not its loss); it holds token_weight already. None: no
        gradient is wanted.
    """

    target: Tensor
    class_weight: Tensor | None
    token_weight: Tensor | None
    gradient_factor: Tensor | None


@dataclass(frozen=True)
class RowOutputs:
    """Written by a row kernel, contiguous views [rows] of the whole batch's outputs.

    loss: fp32, with token_weight. log_prob: fp32, log s_target (soft targets: Σ q_v·log s_v). entropy: fp32,
    −Σ s·log s. lse: fp32. correct: bool, whether no logit is greater than the target's (soft: than that of
    the likeliest class).
    """

    loss: Tensor
    log_prob: Tensor
    entropy: Tensor
    lse: Tensor
    correct: Tensor

    def rows(self, start: int, stop: int) -> RowOutputs:
        return RowOutputs(*(getattr(self, name)[start:stop] for name in OUTPUTS))


OUTPUTS = ("loss", "log_prob", "entropy", "lse", "correct")


class RowKernel(Protocol):
    def __call__(self, logits: Tensor, inputs: RowInputs, options: RowOptions, outputs: RowOutputs) -> None:
        """logits: x [rows, V], contiguous, fp32, bf16 or fp16. Where `gradient_factor` is given they are overwritten
        with gradient_factor·∂(loss/token_weight)/∂x in their own dtype, rounded once; otherwise they may be left in
        any state. A row with a NaN or +inf among its logits gets a loss that is not finite."""
        ...


def torch_rows(logits: Tensor, inputs: RowInputs, options: RowOptions, outputs: RowOutputs) -> None:
    """The row kernel in torch's own operators, on any device: right, and slower than a compiled one."""
    z = logits.float() * options.scale
    if options.softcap:
        z = options.softcap * torch.tanh(z / options.softcap)
    vocab = z.shape[1]
    soft = inputs.target.is_floating_point()
    log_s = torch.log_softmax(z, dim=1)  # not z − lse, which rounds at the size of lse
    greatest = z.amax(dim=1)
    lse = greatest - log_s.amax(dim=1)
    target = inputs.target.argmax(dim=1) if soft else inputs.target
    at = target[:, None]
    top = z.gather(1, at)[:, 0] >= greatest

    smoothing = options.label_smoothing
    w = inputs.class_weight
    if soft:
        a = (1 - smoothing) * inputs.target + smoothing / vocab
        a = a if w is None else a * w
        log_prob = _dot(inputs.target, log_s)
        a_sum, a_target = a.sum(dim=1), None
        ce = -_dot(a, log_s)
    else:
        log_prob = log_s.gather(1, at)[:, 0]
        a_target = torch.full_like(lse, 1 - smoothing) if w is None else (1 - smoothing) * w[target]
        ce, a_sum, a = -a_target * log_prob, a_target, None
        if smoothing:
            share = smoothing / vocab
            ce = ce - share * (log_s.sum(dim=1) if w is None else log_s @ w)
            a_sum = a_sum + share * (vocab if w is None else w.sum())
            a = torch.full_like(w, share) * w if w is not None else z.new_full((vocab,), share)

    focal, steep = torch.ones_like(lse), torch.zeros_like(lse)
    if options.focal_gamma:
        s, miss = log_prob.exp(), -torch.expm1(log_prob)
        focal = miss**options.focal_gamma
        # (1−s)^γ / (1−s), with its limit where γ ≥ 1 and the row is certain
        slope = torch.where(miss > 0, focal / miss.clamp_min(torch.finfo(miss.dtype).tiny), 0.0)
        steep = options.focal_gamma * slope * s * ce
    loss = focal * ce + options.z_loss * lse.square()
    outputs.loss.copy_(loss if inputs.token_weight is None else loss * inputs.token_weight)
    outputs.log_prob.copy_(log_prob)
    outputs.lse.copy_(lse)
    outputs.correct.copy_(top)
    outputs.entropy.copy_(-_dot(log_s.exp(), log_s))
    if inputs.gradient_factor is None:
        return

    slope_z = None if not options.softcap else (1 - (z / options.softcap).square_())
    certain = focal * a_sum + steep + 2 * options.z_loss * lse
    gradient = log_s.exp_().mul_(certain[:, None])
    if a is not None:
        gradient -= focal[:, None] * a
    if a_target is not None:
        # (F·A + K + 2ζ·lse)·s − F·a − K, by whichever of s and 1 − s is small: nothing cancels at either end
        a_target = a_target if a is None else a_target + a.expand(vocab)[target]
        rest = focal * (a_sum - a_target) + 2 * options.z_loss * lse
        s = log_prob.exp()
        doubtful, sure = certain * s - focal * a_target - steep, certain * torch.expm1(log_prob) + rest
        gradient.scatter_(1, at, torch.where(s < 0.5, doubtful, sure)[:, None])
    if slope_z is not None:
        gradient *= slope_z
    gradient *= (inputs.gradient_factor * options.scale)[:, None]
    logits.copy_(gradient)


def _dot(a: Tensor, log_s: Tensor) -> Tensor:
    """Σ_v a_v·log s_v by row, with 0·(−inf) = 0: a masked class has neither probability nor target."""
    return torch.where(a == 0, 0.0, a * log_s).sum(dim=1)
