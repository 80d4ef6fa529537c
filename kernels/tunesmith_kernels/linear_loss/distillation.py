"""Linear distillation: a student's hidden states × head weight, and a teacher → loss and gradients, never the whole
logits of either.

The formula is in `distillation_rows`, the chunks are in `distillation_chunks`. This file has the public function and
the torch.library operator; its autograd is in `function`."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from tunesmith_kernels.linear_loss import function
from tunesmith_kernels.linear_loss.backends import Backend, choose
from tunesmith_kernels.linear_loss.checks import as_rows, constant
from tunesmith_kernels.linear_loss.chunks import Wanted
from tunesmith_kernels.linear_loss.distillation_checks import (
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    check_distillation,
    check_distillation_range,
    flat_teacher,
    options_of,
)
from tunesmith_kernels.linear_loss.distillation_chunks import (
    DistillationProblem,
    Teacher,
    compute_distillation,
)
from tunesmith_kernels.linear_loss.distillation_reference import distillation_losses
from tunesmith_kernels.linear_loss.distillation_rows import (
    DISTILLATION_OUTPUTS,
    DistillationKernel,
    DistillationOptions,
    DistillationOutputs,
    Divergence,
    torch_distillation_rows,
)


class DistillationStats(NamedTuple):
    """Per row, detached, in the shape of hidden without its last dimension; 0 and False where the target is ignored.

    kd: fp32, T²·D, without weights. log_prob: fp32, the student's log-probability of the target at temperature 1, 0
    without a target. entropy: fp32, of the student at temperature 1, in nats. agree: bool, whether a class is the
    likeliest of both. counted: bool, not ignored.
    """

    kd: Tensor
    log_prob: Tensor
    entropy: Tensor
    agree: Tensor
    counted: Tensor

    @property
    def ce(self) -> Tensor:
        """The cross-entropy of the target, without weights."""
        return -self.log_prob


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    teacher: TeacherHidden | TeacherLogits | TeacherTopK,
    bias: Tensor | None = None,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    ignore_index: int = -100,
    normalizer: Tensor | None = None,
    reduction: Literal["sum", "none"] = "sum",
    token_weight: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: Backend | None = None,
    return_stats: bool = False,
) -> Any:
    """The distillation loss of a linear head: a 0-dim fp32 tensor, or fp32 in the shape of hidden without its last
    dimension for `reduction="none"`; with `return_stats`, a pair (loss, DistillationStats).

    Σ token_weight·(kd_weight·T²·D(teacher, student) + ce_weight·CE(student, target)) / normalizer, by the formula in
    `tunesmith_kernels.linear_loss.distillation_rows`. The products and the logits are in the dtypes of student's and
    teacher's hidden states (under autocast, in autocast's), all else is fp32; the gradients are in the dtypes of their
    tensors. The teacher gets no gradient, and its tensors may not require one.

    hidden: [..., H] fp32, bf16 or fp16, the student's. weight: [V, H]; bias: [V]; softcap > 0 and scale: of the
        student's logits, cap·tanh(scale·logits/cap).
    target: int64 [...], 0..V−1 or `ignore_index`: rows to be ignored count for neither term. None: every row counts,
        and there is no cross-entropy. The cross-entropy is at temperature 1.
    teacher: `TeacherHidden`, `TeacherLogits` or `TeacherTopK`, with as many classes as the student, or with `vocab`.
    divergence: "forward_kl" KL(p‖q), "reverse_kl" KL(q‖p), with p the teacher and q the student; or "jsd", GKD's
        generalised Jensen-Shannon divergence β·KL(p‖m) + (1−β)·KL(q‖m), m = β·p + (1−β)·q, with 0 < beta < 1.
    temperature: > 0, divides both logits; T² keeps the gradient's size. ce_weight, kd_weight: ≥ 0.
    normalizer: 0-dim, what the sum is divided by: the labelled units of the global batch, so that micro-batches add up
        to the gradient of the whole. None divides by nothing; there is no mean, since its count would be hidden.
    token_weight: [...].
    backend: "reference" (whole logits, autograd), "torch" (chunks, torch's operators), "cpu" (chunks, C++), "triton";
        None chooses: see `tunesmith_kernels.explain`.

    The gradients are computed in the forward and scaled in the backward (so that fp16, whose loss scale is not known
    by then, loses entries of the logits' gradients below 4e-9 of a row's loss, whatever that scale); with
    `reduction="none"` the logits are computed a second time there. A gradient that nothing asks for is not computed. A
    second backward through the same loss raises or is right; double backward raises. Nothing of the caller's is
    written to.

    Raises ValueError for shapes, dtypes and combinations that this does not have. A target or an index that is no class
    raises IndexError on the CPU; on a GPU its loss is NaN.
    """
    options = options_of(teacher, divergence, beta, temperature, kd_weight, ce_weight, softcap or 0.0, scale)
    check_distillation(hidden, weight, target, bias, teacher, options, softcap, reduction)
    rows, flat = hidden.shape[:-1], as_rows(hidden)
    problem = DistillationProblem(
        flat,
        weight if teacher.vocab is None else weight[: teacher.vocab],
        bias if bias is None or teacher.vocab is None else bias[: teacher.vocab],
        flat_teacher(teacher, flat),
        None if target is None else target.reshape(-1).contiguous(),
        constant("token_weight", token_weight, rows, flat),
        ignore_index,
        options,
    )
    factor = constant("normalizer", normalizer, (), flat)
    factor = None if factor is None else factor.reciprocal()
    name = choose(flat, backend)
    if name == "reference":
        check_distillation_range(problem)
        losses, outputs = distillation_losses(problem)
        losses = losses if factor is None else losses * factor
        loss = losses.sum() if reduction == "sum" else losses
    else:
        loss, outputs = _chunked(problem, factor, reduction, name)
    loss = loss if reduction == "sum" else loss.reshape(rows)
    return (loss, _stats(problem, outputs, rows)) if return_stats else loss


def _stats(problem: DistillationProblem, outputs: DistillationOutputs, rows: torch.Size) -> DistillationStats:
    kept = (
        torch.ones_like(outputs.agree) if problem.target is None else problem.target != problem.ignore_index
    )
    values = outputs.kd, outputs.log_prob, outputs.entropy, outputs.agree, kept
    return DistillationStats(*(value.reshape(rows) for value in values))


def _chunked(
    problem: DistillationProblem, factor: Tensor | None, reduction: str, backend: str
) -> tuple[Tensor, DistillationOutputs]:
    options, teacher = problem.options, problem.teacher
    numbers = (
        problem.ignore_index,
        options.divergence,
        options.beta,
        options.temperature,
        options.kd_weight,
        options.ce_weight,
        options.softcap,
        options.scale,
        options.teacher_softcap,
        options.teacher_scale,
        options.tail,
        backend,
    )
    tensors = (
        *(problem.hidden, problem.weight, problem.bias),
        *(teacher.hidden, teacher.weight, teacher.bias, teacher.logits, teacher.indices, teacher.log_probs),
        *(problem.target, problem.token_weight, factor),
    )
    loss, *stats = function.apply("linear_distillation", reduction, tensors, numbers)
    return loss, DistillationOutputs(loss.detach(), *stats)


def row_kernel(backend: str) -> DistillationKernel:
    match backend:
        case "torch":
            return torch_distillation_rows
        case "cpu":
            from tunesmith_kernels.linear_loss.distillation_native import native_distillation_rows

            return native_distillation_rows
        case "triton":
            from tunesmith_kernels.linear_loss.triton_distillation import triton_distillation_rows

            return triton_distillation_rows
        case _:
            raise AssertionError(backend)


@torch.library.custom_op("tunesmith::linear_distillation", mutates_args=())
def _operator(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: Tensor | None,
    indices: Tensor | None,
    log_probs: Tensor | None,
    target: Tensor | None,
    token_weight: Tensor | None,
    factor: Tensor | None,
    ignore_index: int,
    divergence: str,
    beta: float,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    softcap: float,
    scale: float,
    teacher_softcap: float,
    teacher_scale: float,
    tail: bool,
    backend: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, kd, log_prob, entropy, agree [N]; gradients of hidden, weight and bias, empty where not wanted."""
    options = DistillationOptions(
        *(cast(Divergence, divergence), beta, temperature, kd_weight, ce_weight, softcap, scale),
        *(teacher_softcap, teacher_scale, tail),
    )
    teacher = Teacher(teacher_hidden, teacher_weight, teacher_bias, teacher_logits, indices, log_probs)
    problem = DistillationProblem(hidden, weight, bias, teacher, target, token_weight, ignore_index, options)
    check_distillation_range(problem)
    outputs = _new_outputs(hidden, torch.Tensor.new_zeros)
    wanted = Wanted(want_hidden, want_weight, want_bias)
    with torch.autocast(hidden.device.type, enabled=False):
        found = compute_distillation(problem, row_kernel(backend), wanted, factor, outputs)
    return *(getattr(outputs, name) for name in DISTILLATION_OUTPUTS), found.hidden, found.weight, found.bias


@_operator.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    want_hidden, want_weight, want_bias = rest[-3:]
    outputs = _new_outputs(hidden, torch.Tensor.new_empty)
    fp16 = hidden.dtype == torch.float16
    bias_dtype = weight.dtype if bias is None else bias.dtype
    gradients = (
        torch.empty_like(hidden) if want_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape if want_weight else 0, dtype=torch.float32 if fp16 else weight.dtype),
        weight.new_empty(weight.shape[0] if want_bias else 0, dtype=torch.float32 if fp16 else bias_dtype),
    )
    return *(getattr(outputs, name) for name in DISTILLATION_OUTPUTS), *gradients


def _new_outputs(hidden: Tensor, new: Any) -> DistillationOutputs:
    rows = hidden.shape[0]
    loss, kd, log_prob, entropy = (
        new(hidden, (rows,), dtype=torch.float32) for _ in DISTILLATION_OUTPUTS[:-1]
    )
    return DistillationOutputs(loss, kd, log_prob, entropy, new(hidden, (rows,), dtype=torch.bool))
