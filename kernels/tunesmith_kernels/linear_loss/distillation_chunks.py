"""A student's hidden states × head weight, and a teacher → distillation loss and gradients, a chunk of rows at a time:
the whole logits of neither exist.

Per chunk: the student's logits into one buffer and the teacher's into another, which all chunks share; a row kernel
overwrites the student's with the gradient of the loss; two more products add it to the gradients of hidden and
weight. Rows whose target is ignored are dropped before the first product, the student's and the teacher's. On the CPU
rows of zeros follow a chunk's own in products in 16 bits, as in `chunks`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith_kernels.linear_loss.chunks import (
    Chunk,
    Gradients,
    Sums,
    Wanted,
    chunk_rows,
    kept_rows,
    pads,
    product_rows,
    row_chunks,
    row_factor,
)
from tunesmith_kernels.linear_loss.distillation_rows import (
    DISTILLATION_OUTPUTS,
    DistillationInputs,
    DistillationKernel,
    DistillationOptions,
    DistillationOutputs,
)


@dataclass(frozen=True)
class Teacher:
    """The teacher of N rows: hidden [N, Ht], weight [V, Ht] and bias [V] or None, whose product is computed in hidden's
    dtype; or logits [N, V], rows may be apart; or indices int64 [N, k] and log_probs fp32 [N, k]. What it is not is
    None."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    logits: Tensor | None = None
    indices: Tensor | None = None
    log_probs: Tensor | None = None


@dataclass(frozen=True)
class DistillationProblem:
    """hidden [N, H] and weight [V, H], bias [V] or None; target int64 [N] or None; token_weight fp32 [N] or None. The
    student's product is computed in hidden's dtype."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher: Teacher
    target: Tensor | None
    token_weight: Tensor | None
    ignore_index: int
    options: DistillationOptions


def compute_distillation(
    problem: DistillationProblem,
    kernel: DistillationKernel,
    wanted: Wanted,
    factor: Tensor | None,
    outputs: DistillationOutputs,
) -> Gradients:
    """Fills `outputs` ([N], zeros on entry; ignored rows stay 0) and returns the gradients of Σ factor·loss, to be
    multiplied by `chunks.remaining`.

    factor: fp32, 0-dim or [N], on hidden's device: what a row's loss is multiplied by on its way to the sum.
    """
    hidden, vocab = problem.hidden, problem.weight.shape[0]
    kept = None if problem.target is None else kept_rows(problem.target, problem.ignore_index)
    rows = hidden.shape[0] if kept is None else kept.shape[0]
    teacher = _TeacherLogits(problem.teacher)
    itemsize = max(hidden.element_size(), teacher.itemsize)
    padded = pads(hidden.dtype, hidden.device.type)
    size = chunk_rows(rows, vocab, itemsize, hidden.device.type, padded=padded)
    chunks = -(-rows // size) if rows else 0
    sums = Sums(hidden, problem.weight, problem.bias, wanted, chunks, all_rows=kept is None)
    product = Product(problem.weight, problem.bias, hidden.dtype)
    row_factors = row_factor(factor, problem.token_weight, hidden) if wanted else None
    buffer = hidden.new_empty((size if rows else 0, vocab))
    teacher.reserve(size if rows else 0)
    for part in row_chunks(kept, rows, size):
        x, out = part.operand(hidden), _outputs_of(part, outputs)
        logits = product.into(buffer, x)
        inputs = DistillationInputs(
            teacher.of(part),
            *(_rows(part, value) for value in (problem.teacher.indices, problem.teacher.log_probs)),
            *(_rows(part, value) for value in (problem.target, problem.token_weight, row_factors)),
        )
        kernel(logits[: part.rows], inputs, problem.options, out)
        if part.index is not None:
            for name in DISTILLATION_OUTPUTS:
                getattr(outputs, name).index_copy_(0, part.index, getattr(out, name))
        if wanted:
            logits[part.rows :].zero_()
            sums.add(part, logits, x, product.weight)
    return sums.gradients()


class Product:
    """hidden·weightᵀ + bias in one dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)

    def into(self, buffer: Tensor, x: Tensor) -> Tensor:
        """The product for x [rows, H], in the first rows of buffer [≥ rows, V]."""
        logits = buffer[: x.shape[0]]
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=logits)
        return torch.addmm(self.bias, x, self.weight.t(), out=logits)


class _TeacherLogits:
    """The teacher's logits of a chunk: computed, or cut out of those that it came with."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        source = teacher.hidden if teacher.logits is None else teacher.logits
        self.itemsize = 0 if source is None else source.element_size()
        self.product = self.buffer = None
        if teacher.hidden is not None:
            assert teacher.weight is not None
            self.product = Product(teacher.weight, teacher.bias, teacher.hidden.dtype)

    def reserve(self, rows: int) -> None:
        if self.product is not None:
            weight = self.product.weight
            most = product_rows(rows, weight.dtype, weight.device.type)
            self.buffer = weight.new_empty((most, weight.shape[0]))

    def of(self, part: Chunk) -> Tensor | None:
        if self.product is not None:
            assert self.teacher.hidden is not None
            assert self.buffer is not None
            return self.product.into(self.buffer, part.operand(self.teacher.hidden))[: part.rows]
        return None if self.teacher.logits is None else part.of(self.teacher.logits).contiguous()


def _rows(part: Chunk, whole: Tensor | None) -> Tensor | None:
    return None if whole is None else part.of(whole)


def _outputs_of(part: Chunk, outputs: DistillationOutputs) -> DistillationOutputs:
    """Where the chunk's outputs go: into the batch's own memory, unless its rows lie apart there."""
    values = (getattr(outputs, name) for name in DISTILLATION_OUTPUTS)
    if part.index is None:
        return DistillationOutputs(*(value[part.start : part.stop] for value in values))
    return DistillationOutputs(*(value.new_empty(part.rows) for value in values))
