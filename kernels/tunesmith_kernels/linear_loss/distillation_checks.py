"""The teachers of a linear distillation, and what one is given: checked, and brought into the shape of the chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import get_args

import torch
from torch import Tensor

from tunesmith_kernels.linear_loss.checks import as_rows, check_head
from tunesmith_kernels.linear_loss.distillation_chunks import DistillationProblem, Teacher
from tunesmith_kernels.linear_loss.distillation_rows import DistillationOptions, Divergence


@dataclass(frozen=True)
class TeacherHidden:
    """A teacher by its hidden states [..., Ht], whose leading dimensions are those of the student's, and its head:
    weight [Vt, Ht], bias [Vt], softcap and scale as the student's own. Ht need not be the student's H.

    vocab: None: student and teacher have the same classes. n: only the first n classes are the same; those after,
    padding of either, are left out of both distributions and of the cross-entropy, as if their logits were −inf.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    vocab: int | None = None


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher by its logits [..., Vt], as they go into the softmax. vocab: see `TeacherHidden`."""

    logits: Tensor
    vocab: int | None = None


@dataclass(frozen=True)
class TeacherTopK:
    """A teacher by some of its classes: indices int64 [..., k], different within a row, and log_probs [..., k], its
    log-probabilities of these classes *at the temperature of the loss*, log softmax(logits/T), not renormalised.

    tail: True: all other classes are one more class, with what the k leave of either distribution; the log_probs of a
    row must then be of a sum of at most 1. False: both distributions are normalised over the k classes alone.
    vocab: as for `TeacherHidden`: the student's classes from n on are left out.
    """

    indices: Tensor
    log_probs: Tensor
    tail: bool = True
    vocab: int | None = None


def options_of(
    teacher: TeacherHidden | TeacherLogits | TeacherTopK,
    divergence: Divergence,
    beta: float,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    softcap: float,
    scale: float,
) -> DistillationOptions:
    head = teacher if isinstance(teacher, TeacherHidden) else None
    return DistillationOptions(
        divergence,
        beta,
        temperature,
        kd_weight,
        ce_weight,
        softcap,
        scale,
        0.0 if head is None else head.softcap or 0.0,
        1.0 if head is None else head.scale,
        isinstance(teacher, TeacherTopK) and teacher.tail,
    )


def check_distillation(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    teacher: TeacherHidden | TeacherLogits | TeacherTopK,
    options: DistillationOptions,
    softcap: float | None,
    reduction: str,
) -> None:
    """Raises ValueError, with one line, for what no path computes."""
    check_head(hidden, weight, bias)
    if target is None:
        if options.ce_weight:
            raise _error("ce_weight needs a target")
    elif list(target.shape) != [*hidden.shape[:-1]] or target.dtype != torch.int64:
        raise _error(
            f"target is int64 {[*hidden.shape[:-1]]} for this hidden, not {_name(target)} {list(target.shape)}"
        )
    elif target.device != hidden.device:
        raise _error(f"target is on {target.device}, hidden on {hidden.device}")
    if reduction not in ("sum", "none"):
        raise _error(f'reduction is "sum" or "none", not {reduction!r}: no hidden mean')
    if options.divergence not in get_args(Divergence):
        raise _error(f"divergence is one of {', '.join(get_args(Divergence))}, not {options.divergence!r}")
    if options.divergence == "jsd" and not 0 < options.beta < 1:
        raise _error(
            f"beta lies between 0 and 1, not at {options.beta}: for the limits ask for forward_kl or reverse_kl"
        )
    if not 0 < options.temperature < math.inf:
        raise _error(f"temperature is finite and positive, not {options.temperature}")
    for name in ("kd_weight", "ce_weight"):
        if not 0 <= getattr(options, name) < math.inf:
            raise _error(f"{name} is finite and not negative, not {getattr(options, name)}")
    caps = {
        "softcap": softcap,
        "teacher.softcap": teacher.softcap if isinstance(teacher, TeacherHidden) else None,
    }
    for name, cap in caps.items():
        if cap is not None and not 0 < cap < math.inf:
            raise _error(f"{name} is finite and positive, or None, not {cap}")
    for name, scale in (("scale", options.scale), ("teacher.scale", options.teacher_scale)):
        if not math.isfinite(scale) or scale == 0:
            raise _error(f"{name} is finite and not 0, not {scale}")
    _check_teacher(hidden, weight, teacher)


def _check_teacher(
    hidden: Tensor, weight: Tensor, teacher: TeacherHidden | TeacherLogits | TeacherTopK
) -> None:
    for field in fields(teacher):
        value = getattr(teacher, field.name)
        if not isinstance(value, Tensor):
            continue
        if value.requires_grad:
            raise _error(
                f"teacher.{field.name} requires a gradient, which is not computed: detach it, or freeze the teacher"
            )
        if value.device != hidden.device:
            raise _error(f"teacher.{field.name} is on {value.device}, hidden on {hidden.device}")
    rows = [*hidden.shape[:-1]]
    if isinstance(teacher, TeacherHidden):
        check_head(teacher.hidden, teacher.weight, teacher.bias, "teacher.")
        _check_rows("teacher.hidden", teacher.hidden, rows)
        _check_vocab(weight.shape[0], teacher.weight.shape[0], teacher.vocab)
    elif isinstance(teacher, TeacherLogits):
        if not teacher.logits.is_floating_point() or hasattr(teacher.logits, "to_local"):
            raise _error("teacher.logits is a floating tensor, and no DTensor")
        _check_rows("teacher.logits", teacher.logits, rows)
        _check_vocab(weight.shape[0], teacher.logits.shape[-1], teacher.vocab)
    else:
        _check_rows("teacher.indices", teacher.indices, rows)
        classes = weight.shape[0] if teacher.vocab is None else teacher.vocab
        _check_vocab(weight.shape[0], classes, teacher.vocab)
        k = teacher.indices.shape[-1]
        if teacher.indices.dtype != torch.int64 or not 1 <= k <= classes:
            raise _error(
                f"teacher.indices is int64 [..., k] with k from 1 to {classes}, not {_name(teacher.indices)}, {k}"
            )
        if teacher.log_probs.shape != teacher.indices.shape or not teacher.log_probs.is_floating_point():
            raise _error(
                f"teacher.log_probs is floating, of the shape of the indices, {list(teacher.indices.shape)}"
            )


def _check_rows(name: str, value: Tensor, rows: list[int]) -> None:
    if [*value.shape[:-1]] != rows:
        raise _error(f"{name} is {[*rows, '…']} beside this hidden, not {list(value.shape)}")


def _check_vocab(student: int, teacher: int, vocab: int | None) -> None:
    if vocab is None:
        if student != teacher:
            raise _error(
                f"the student has {student} classes and the teacher {teacher}: give the teacher vocab, the number of "
                "leading classes that are the same"
            )
    elif not 2 <= vocab <= min(student, teacher):
        raise _error(f"teacher.vocab lies between 2 and {min(student, teacher)} here, not at {vocab}")


def check_distillation_range(problem: DistillationProblem) -> None:
    """On the CPU: raises IndexError for a target or an index that is no class, ValueError for indices that repeat in a
    row and for log_probs that are none. Fake tensors have no numbers."""
    if (
        torch.compiler.is_compiling()
        or problem.hidden.device.type != "cpu"
        or type(problem.hidden) is not Tensor
    ):
        return
    classes, target, teacher = problem.weight.shape[0], problem.target, problem.teacher
    if target is not None:
        wrong = (target != problem.ignore_index) & ((target < 0) | (target >= classes))
        if wrong.any():
            raise IndexError(
                f"linear loss: target {int(target[wrong][0])} is not a class, 0 to {classes - 1}"
            )
    if teacher.indices is None or teacher.log_probs is None or teacher.indices.numel() == 0:
        return
    least, most = (int(value) for value in teacher.indices.aminmax())
    if least < 0 or most >= classes:
        found = least if least < 0 else most
        raise IndexError(
            f"linear loss: teacher.indices has {found}, which is not a class, 0 to {classes - 1}"
        )
    ordered = teacher.indices.sort(dim=1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("linear loss: teacher.indices has a class twice in a row")
    greatest = teacher.log_probs.amax().item()
    if problem.options.tail and greatest > 1e-3:
        raise ValueError(f"linear loss: teacher.log_probs has {greatest:.4g}: a log-probability is at most 0")


def flat_teacher(teacher: TeacherHidden | TeacherLogits | TeacherTopK, hidden: Tensor) -> Teacher:
    """The teacher of the rows of `hidden` [N, H]."""
    vocab = teacher.vocab
    if isinstance(teacher, TeacherHidden):
        bias = None if teacher.bias is None else teacher.bias[:vocab]
        return Teacher(as_rows(teacher.hidden), teacher.weight[:vocab], bias)
    if isinstance(teacher, TeacherLogits):
        return Teacher(logits=teacher.logits.reshape(hidden.shape[0], teacher.logits.shape[-1])[:, :vocab])
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    k = teacher.indices.shape[-1]
    log_probs = teacher.log_probs.reshape(-1, k).to(wide).contiguous()
    return Teacher(indices=teacher.indices.reshape(-1, k).contiguous(), log_probs=log_probs)


def _error(message: str) -> ValueError:
    return ValueError(f"linear loss: {message}")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
