"""Hidden states × head weight → loss and gradients, a chunk of rows at a time: the whole logits never exist.

Per chunk: logits = hidden·weightᵀ + bias into one buffer that all chunks share; a row kernel overwrites it with the
gradient of the loss; two more products add the chunk to the gradients of hidden and weight. Rows whose target is
ignored are dropped before the first product. (Gradients in the forward: Hsu et al. 2024, Liger Kernel.)

On the CPU the products in 16 bits are oneDNN's, which keeps what it compiled for each new shape. How many rows are
labelled is another number in every step, so there rows of zeros follow a chunk's own, up to one of a few numbers."""

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
# A product that is added to sums of another dtype on the CPU, a tile of classes at a time: small enough that it and its
# cast stay in the cache, and that it leaves no large hole in the C library's heap when what is allocated after it stays
_TILE_BYTES = 4_000_000
# Rows of a 16-bit product on the CPU are a multiple of 1/32 of the next power of two, and of 8: at most 1/16 more
# where they are over 128, and 16 different numbers of rows from any power of two to the next
_ROW_STEP, _STEPS = 8, 32


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


def chunk_rows(rows: int, vocab: int, itemsize: int, device: str, *, padded: bool = False) -> int:
    """Rows per chunk: as many as the byte budget holds, evenly over the chunks. padded: a number that `product_rows`
    leaves as it is, which may be more than `rows`."""
    budget = _CHUNK_BYTES.get(device, _CHUNK_BYTES["cuda"]) // (vocab * itemsize)
    most = max(_MIN_ROWS.get(device, _MIN_ROWS["cuda"]), budget // 32 * 32)
    if padded:
        most -= most % _row_step(most)
    chunks = max(1, -(-rows // most))
    size = max(1, -(-rows // chunks))
    return _padded(size) if padded else size


def pads(dtype: torch.dtype, device: str) -> bool:
    """Whether rows of zeros are added to a product in this dtype."""
    return device == "cpu" and dtype.itemsize == 2


def product_rows(rows: int, dtype: torch.dtype, device: str) -> int:
    """Rows of the product for a chunk of so many."""
    return _padded(rows) if pads(dtype, device) else rows


def _padded(rows: int) -> int:
    step = _row_step(rows)
    return -(-rows // step) * step


def _row_step(rows: int) -> int:
    return max(_ROW_STEP, (1 << (rows - 1).bit_length()) // _STEPS)


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
    padded = pads(hidden.dtype, hidden.device.type)
    size = chunk_rows(rows, vocab, hidden.element_size(), hidden.device.type, padded=padded)
    chunks = -(-rows // size) if rows else 0
    sums = Sums(hidden, problem.weight, problem.bias, wanted, chunks, all_rows=kept is None)
    weight = problem.weight.to(hidden.dtype)
    bias = None if problem.bias is None else problem.bias.to(hidden.dtype)
    buffer = hidden.new_empty((size if rows else 0, vocab))
    row_factors = row_factor(factor, problem.token_weight, hidden) if wanted else None
    for part in row_chunks(kept, rows, size):
        x, out = part.operand(hidden), part.outputs(outputs)
        logits = buffer[: x.shape[0]]
        if bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias, x, weight.t(), out=logits)
        kernel(logits[: part.rows], part.inputs(problem, row_factors), problem.options, out)
        part.put(out, outputs)
        if wanted:
            logits[part.rows :].zero_()
            sums.add(part, logits, x, weight)
    return sums.gradients()


@dataclass(frozen=True)
class Chunk:
    """Rows start..stop of those that are kept."""

    start: int
    stop: int
    index: Tensor | None  # the rows' places in the batch; None: start..stop themselves

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def of(self, whole: Tensor) -> Tensor:
        return whole[self.start : self.stop] if self.index is None else whole.index_select(0, self.index)

    def operand(self, whole: Tensor) -> Tensor:
        """`of(whole)` as a product takes it: rows of zeros follow, up to `product_rows`."""
        rows = product_rows(self.rows, whole.dtype, whole.device.type)
        if rows == self.rows:
            return self.of(whole)
        padded = whole.new_empty((rows, *whole.shape[1:]))
        padded[self.rows :].zero_()
        own = padded[: self.rows]
        if self.index is None:
            own.copy_(whole[self.start : self.stop])
        else:
            torch.index_select(whole, 0, self.index, out=own)
        return padded

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
        return RowOutputs(*(getattr(outputs, name).new_empty(self.rows) for name in OUTPUTS))

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
        """gradient [rows, V] of the chunk's logits, x [rows, H] its hidden states; both with the same rows of zeros
        after the chunk's own, or none."""
        if self.wanted.hidden:
            if part.index is not None:
                self.hidden.index_copy_(0, part.index, torch.mm(gradient, weight)[: part.rows])
            elif gradient.shape[0] == part.rows:
                torch.mm(gradient, weight, out=self.hidden[part.start : part.stop])
            else:
                self.hidden[part.start : part.stop] = torch.mm(gradient, weight)[: part.rows]
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
            # an fp16 sum over many rows would overflow
            dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
            x = x.to(dtype)
            buffer = x.new_empty((min(tile, self.weight.shape[0]), x.shape[1]))
            for start in range(0, self.weight.shape[0], tile):
                own = self.weight[start : start + tile]
                part = gradient[:, start : start + tile].t()
                product = torch.mm(part.to(dtype), x, out=buffer[: own.shape[0]])
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
