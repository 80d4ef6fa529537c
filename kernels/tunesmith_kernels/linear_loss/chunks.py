"""Hidden states × head weight → loss and gradients, a chunk of rows at a time: the whole logits never exist.

Per chunk: logits = hidden·weightᵀ + bias into one buffer that all chunks share; a row kernel overwrites it with the
gradient of the loss; two more products add the chunk to the gradients of hidden and weight. Rows whose target is
ignored are dropped before the first product. (Gradients in the forward: Hsu et al. 2024, Liger Kernel.)"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith_kernels.linear_loss.rows import OUTPUTS, RowInputs, RowKernel, RowOptions, RowOutputs

# what one chunk's logits may take; a chunk of fewer rows than the minimum would be bound by the traffic of the weight
# and its gradient rather than by the products
_CHUNK_BYTES = {"cpu": 52_000_000, "cuda": 512_000_000}
_MIN_ROWS = {"cpu": 256, "cuda": 1024}
# Sums over more chunks than this are kept in fp32 where the weight is not: each addition rounds once
_MAX_ROUNDINGS = 8
# fp16 has few exponents: gradients are kept near 1 until the caller's own scale is known. Not much above, since sums
# over classes and weights of the rows come on top.
_FP16_SCALE = 16.0
_TILE_BYTES = 32_000_000


@dataclass(frozen=True)
class Wanted:
    """Which gradients are computed."""

    hidden: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True)
class Problem:
    """hidden [N, H] and weight [V, H], bias [V] or None; target int64 [N] or fp32 [N, V]; class_weight fp32 [V] or
    None; token_weight fp32 [N] or None. The product is computed in `dtype`: hidden's own."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    class_weight: Tensor | None
    token_weight: Tensor | None
    ignore_index: int
    options: RowOptions


@dataclass(frozen=True)
class Gradients:
    """hidden [N, H], weight [V, H], bias [V], in their parameters' dtypes, but weight and bias in fp32 where hidden is
    fp16; empty where not wanted. Still to be multiplied by `remaining(hidden.dtype)`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def remaining(dtype: torch.dtype) -> float:
    """The factor that `compute` leaves to its caller, who knows the scale of the loss: 1 but for fp16."""
    return 1.0 / _FP16_SCALE if dtype == torch.float16 else 1.0


def chunk_rows(rows: int, vocab: int, itemsize: int, device: str) -> int:
    """Rows per chunk: as many as the byte budget holds, evenly over the chunks."""
    budget = _CHUNK_BYTES.get(device, _CHUNK_BYTES["cuda"]) // (vocab * itemsize)
    most = max(_MIN_ROWS.get(device, _MIN_ROWS["cuda"]), budget // 32 * 32)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def sum_dtype(weight: torch.dtype, hidden: torch.dtype, chunks: int) -> torch.dtype:
    """What the gradient of the weight is summed in over so many chunks."""
    if hidden == torch.float16 or chunks > _MAX_ROUNDINGS:
        return torch.float32
    return torch.float32 if weight == torch.float32 else hidden


def tile_classes(features: int, itemsize: int) -> int:
    """Classes whose gradients are computed at once where they are added to sums of another dtype on the CPU."""
    return max(64, _TILE_BYTES // (features * itemsize))


def compute(
    problem: Problem, kernel: RowKernel, wanted: Wanted, factor: Tensor | None, outputs: RowOutputs
) -> Gradients:
    """Fills `outputs` ([N], zeros on entry; ignored rows stay 0) and returns the gradients of Σ factor·loss.

    factor: fp32, 0-dim or [N], on hidden's device: what a row's loss is multiplied by on its way to the sum.
    """
    hidden, vocab = problem.hidden, problem.weight.shape[0]
    kept = kept_rows(problem.target, problem.ignore_index)
    rows = hidden.shape[0] if kept is None else kept.shape[0]
    size = chunk_rows(rows, vocab, hidden.element_size(), hidden.device.type)
    chunks = -(-rows // size) if rows else 0
    sums = Sums(hidden, problem.weight, problem.bias, wanted, chunks, all_rows=kept is None)
    weight = problem.weight.to(hidden.dtype)
    bias = None if problem.bias is None else problem.bias.to(hidden.dtype)
    buffer = hidden.new_empty((min(size, rows), vocab))
    row_factors = row_factor(factor, problem.token_weight, hidden) if wanted else None
    for part in row_chunks(kept, rows, size):
        x, out = part.of(hidden), part.outputs(outputs)
        logits = buffer[: part.stop - part.start]
        if bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias, x, weight.t(), out=logits)
        kernel(logits, part.inputs(problem, row_factors), problem.options, out)
        part.put(out, outputs)
        if wanted:
            sums.add(part, logits, x, weight)
    return sums.gradients()


@dataclass(frozen=True)
class Chunk:
    """Rows start..stop of those that are kept."""

    start: int
    stop: int
    index: Tensor | None  # the rows' places in the batch; None: start..stop themselves

    def of(self, whole: Tensor) -> Tensor:
        return whole[self.start : self.stop] if self.index is None else whole.index_select(0, self.index)

    def inputs(self, problem: Problem, factor: Tensor | None) -> RowInputs:
        weights = problem.token_weight
        return RowInputs(
            self.of(problem.target),
            problem.class_weight,
            None if weights is None else self.of(weights),
            None if factor is None else self.of(factor),
        )

    def outputs(self, outputs: RowOutputs) -> RowOutputs:
        if self.index is None:
            return outputs.rows(self.start, self.stop)
        return RowOutputs(*(getattr(outputs, name).new_empty(self.stop - self.start) for name in OUTPUTS))

    def put(self, out: RowOutputs, outputs: RowOutputs) -> None:
        if self.index is not None:
            for name in OUTPUTS:
                getattr(outputs, name).index_copy_(0, self.index, getattr(out, name))


def row_chunks(kept: Tensor | None, rows: int, size: int) -> Iterator[Chunk]:
    for start in range(0, rows, max(size, 1)):
        stop = min(start + size, rows)
        yield Chunk(start, stop, None if kept is None else kept[start:stop])


def kept_rows(target: Tensor, ignore_index: int) -> Tensor | None:
    """The rows that have a target; None where all have. On a GPU this waits for the device, once."""
    if target.is_floating_point():
        return None
    if target.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a linear loss counts the labelled rows on the host: not in a CUDA graph")
    kept = (target != ignore_index).nonzero()[:, 0]
    return None if kept.shape[0] == target.shape[0] else kept


def row_factor(factor: Tensor | None, token_weight: Tensor | None, hidden: Tensor) -> Tensor:
    rows = hidden.new_full((hidden.shape[0],), 1.0 / remaining(hidden.dtype), dtype=torch.float32)
    if factor is not None:
        rows *= factor
    if token_weight is not None:
        rows *= token_weight
    return rows


class Sums:
    """The gradients while they are summed over the chunks."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: Wanted,
        chunks: int,
        *,
        all_rows: bool,
    ) -> None:
        self.wanted = wanted
        fresh = torch.empty_like if all_rows else torch.zeros_like
        self.hidden = fresh(hidden) if wanted.hidden else hidden.new_empty(0)
        dtype = sum_dtype(weight.dtype, hidden.dtype, chunks)
        self.weight = weight.new_empty(weight.shape if wanted.weight else 0, dtype=dtype)
        self.started = False
        self.weight_dtype = weight.dtype
        self.bias = weight.new_zeros(weight.shape[0] if wanted.bias else 0, dtype=torch.float32)
        self.bias_dtype = weight.dtype if bias is None else bias.dtype

    def add(self, part: Chunk, gradient: Tensor, x: Tensor, weight: Tensor) -> None:
        """gradient [rows, V] of the chunk's logits, x [rows, H] its hidden states."""
        if self.wanted.hidden:
            if part.index is None:
                torch.mm(gradient, weight, out=self.hidden[part.start : part.stop])
            else:
                self.hidden.index_copy_(0, part.index, torch.mm(gradient, weight))
        if self.wanted.weight:
            self._add_weight(gradient, x)
        if self.wanted.bias:
            self.bias += gradient.sum(dim=0, dtype=torch.float32)
        self.started = True

    def _add_weight(self, gradient: Tensor, x: Tensor) -> None:
        if self.weight.dtype == x.dtype:
            if self.started:
                self.weight.addmm_(gradient.t(), x)
            else:
                torch.mm(gradient.t(), x, out=self.weight)
        elif x.is_cuda:
            if not self.started:
                self.weight.zero_()
            torch.addmm(self.weight, gradient.t(), x, out_dtype=torch.float32, out=self.weight)
        else:
            tile = tile_classes(x.shape[1], x.element_size())
            for start in range(0, self.weight.shape[0], tile):
                part = gradient[:, start : start + tile].t()
                # an fp16 sum over many rows would overflow
                product = part.float() @ x.float() if x.dtype == torch.float16 else part @ x
                own = self.weight[start : start + tile]
                if self.started:
                    own.add_(product)
                else:
                    own.copy_(product)

    def gradients(self) -> Gradients:
        if not self.started:  # every row is ignored
            self.weight.zero_()
        if self.hidden.dtype == torch.float16:
            return Gradients(self.hidden, self.weight, self.bias)
        return Gradients(self.hidden, self.weight.to(self.weight_dtype), self.bias.to(self.bias_dtype))
