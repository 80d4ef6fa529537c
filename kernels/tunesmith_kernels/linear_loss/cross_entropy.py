"""Linear cross-entropy: hidden states × head weight → loss and gradients, never the whole logits.

The formula is in `rows`, the chunks are in `chunks`. This file has the public function, its checks, the torch.library
operator; its autograd is in `function`."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tunesmith_kernels.linear_loss import function, reference
from tunesmith_kernels.linear_loss.backends import Backend, choose, row_kernel
from tunesmith_kernels.linear_loss.checks import as_rows, check, check_range, constant, flat_target
from tunesmith_kernels.linear_loss.chunks import Problem, Wanted, compute
from tunesmith_kernels.linear_loss.rows import OUTPUTS, RowOptions, RowOutputs


class Stats(NamedTuple):
    """Per row, detached, in target's shape [...] (soft targets: hidden's without its last dimension); 0 and False
    where the target is ignored.

    log_prob: fp32, log-probability of the target (soft: Σ q·log p). entropy: fp32, of the prediction, in nats.
    lse: fp32, log Σ exp(logits). correct: bool, no class is likelier than the target. counted: bool, not ignored.
    """

    log_prob: Tensor
    entropy: Tensor
    lse: Tensor
    correct: Tensor
    counted: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    normalizer: Tensor | None = None,
    reduction: Literal["sum", "none"] = "sum",
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    focal_gamma: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: Backend | None = None,
    return_stats: bool = False,
) -> Any:
    """The cross-entropy of a linear head: a 0-dim fp32 tensor, or fp32 in target's shape for `reduction="none"`; with
    `return_stats`, a pair (loss, Stats).

    Equal to `F.cross_entropy(logits.float(), target, …)` with logits = cap·tanh(scale·(hidden·weightᵀ + bias)/cap), and
    the terms of the formula in `tunesmith_kernels.linear_loss.rows`. The product and the logits are in hidden's dtype
    (under autocast, in autocast's), all else is fp32; the gradients are in the dtypes of their tensors.

    hidden: [..., H] fp32, bf16 or fp16. weight: [V, H]; bias: [V].
    target: int64 [...], 0..V−1 or `ignore_index`; or floating [..., V], a distribution per row ("soft").
    normalizer: 0-dim, what the sum is divided by: the labelled units of the global batch, so that micro-batches add up
        to the gradient of the whole. None divides by nothing; there is no mean, since its count would be hidden.
    class_weight: [V]; token_weight: [...]; label_smoothing: in [0, 1); z_loss: factor of Σ lse²; focal_gamma: ≥ 0, not
        with soft targets; softcap: > 0.
    backend: "reference" (whole logits, autograd), "torch" (chunks, torch's operators), "cpu" (chunks, C++), "triton";
        None chooses: see `tunesmith_kernels.explain`.

    The gradients are computed in the forward and scaled in the backward; with `reduction="none"` the logits are
    computed a second time there. fp16, whose loss scale is not known by the forward, loses entries of the logits'
    gradients below 4e-9 of a row's loss. A gradient that nothing asks for (a frozen head, frozen hidden states) is not
    computed. A second backward through the same loss raises or is right; double backward raises. Nothing of the
    caller's is written to.

    Raises ValueError for shapes, dtypes and combinations that this does not have. A target outside 0..V−1 raises
    IndexError on the CPU; on a GPU its loss is NaN.
    """
    options = RowOptions(label_smoothing, z_loss, focal_gamma, softcap or 0.0, scale)
    check(hidden, weight, target, bias, options, softcap)
    if reduction not in ("sum", "none"):
        raise ValueError(
            f'linear_cross_entropy: reduction is "sum" or "none", not {reduction!r}: no hidden mean'
        )
    rows = hidden.shape[:-1]
    flat = as_rows(hidden)
    problem = Problem(
        flat,
        weight,
        bias,
        flat_target(target, flat),
        constant("class_weight", class_weight, (weight.shape[0],), flat),
        constant("token_weight", token_weight, rows, flat),
        ignore_index,
        options,
    )
    factor = constant("normalizer", normalizer, (), flat)
    factor = None if factor is None else factor.reciprocal()
    name = choose(flat, backend)
    if name == "reference":
        check_range(problem)
        losses, outputs = reference.losses(problem)
        losses = losses if factor is None else losses * factor
        loss = losses.sum() if reduction == "sum" else losses
    else:
        loss, outputs = _chunked(problem, factor, reduction, name)
    loss = loss if reduction == "sum" else loss.reshape(rows)
    return (loss, _stats(problem, outputs, rows)) if return_stats else loss


def _stats(problem: Problem, outputs: RowOutputs, rows: torch.Size) -> Stats:
    target = problem.target
    kept = (
        target != problem.ignore_index
        if target.ndim == 1
        else torch.ones_like(target[:, 0], dtype=torch.bool)
    )
    values = outputs.log_prob, outputs.entropy, outputs.lse, outputs.correct, kept
    return Stats(*(value.reshape(rows) for value in values))


def _chunked(
    problem: Problem, factor: Tensor | None, reduction: str, backend: str
) -> tuple[Tensor, RowOutputs]:
    options = problem.options
    numbers = (
        problem.ignore_index,
        options.label_smoothing,
        options.z_loss,
        options.focal_gamma,
        options.softcap,
        options.scale,
        backend,
    )
    tensors = (
        *(problem.hidden, problem.weight, problem.bias),
        *(problem.target, problem.class_weight, problem.token_weight, factor),
    )
    loss, *stats = function.apply("linear_cross_entropy", reduction, tensors, numbers)
    return loss, RowOutputs(loss.detach(), *stats)


@torch.library.custom_op("tunesmith::linear_cross_entropy", mutates_args=())
def _operator(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    factor: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    focal_gamma: float,
    softcap: float,
    scale: float,
    backend: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, log_prob, entropy, lse, correct [N]; gradients of hidden, weight and bias, empty where not wanted."""
    options = RowOptions(label_smoothing, z_loss, focal_gamma, softcap, scale)
    problem = Problem(hidden, weight, bias, target, class_weight, token_weight, ignore_index, options)
    check_range(problem)
    outputs = _new_outputs(hidden, torch.Tensor.new_zeros)
    wanted = Wanted(want_hidden, want_weight, want_bias)
    with torch.autocast(hidden.device.type, enabled=False):
        found = compute(problem, row_kernel(backend), wanted, factor, outputs)
    return *(getattr(outputs, name) for name in OUTPUTS), found.hidden, found.weight, found.bias


@_operator.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    factor: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    focal_gamma: float,
    softcap: float,
    scale: float,
    backend: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _new_outputs(hidden, torch.Tensor.new_empty)
    fp16 = hidden.dtype == torch.float16
    bias_dtype = weight.dtype if bias is None else bias.dtype
    gradients = (
        torch.empty_like(hidden) if want_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape if want_weight else 0, dtype=torch.float32 if fp16 else weight.dtype),
        weight.new_empty(weight.shape[0] if want_bias else 0, dtype=torch.float32 if fp16 else bias_dtype),
    )
    return *(getattr(outputs, name) for name in OUTPUTS), *gradients


def _new_outputs(hidden: Tensor, new: Any) -> RowOutputs:
    rows = hidden.shape[0]
    loss, log_prob, entropy, lse = (new(hidden, (rows,), dtype=torch.float32) for _ in OUTPUTS[:-1])
    return RowOutputs(loss, log_prob, entropy, lse, new(hidden, (rows,), dtype=torch.bool))
