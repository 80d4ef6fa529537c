"""The memory and the work of one linear cross-entropy, from its shapes alone: the arithmetic of `chunks`, for those who
plan a run before it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tunesmith_kernels.linear_loss.chunks import (
    Wanted,
    chunk_rows,
    pads,
    product_rows,
    sum_dtype,
    tile_classes,
)

# bytes per logit that `rows.torch_rows` has beside the chunk itself at its largest, the entropy: four fp32 tensors, a
# mask and a fifth; and per row
_TORCH_ROWS = 5 * 4 + 1, 33
_STATS = 4 * 4 + 1  # bytes of a row's statistics
_INDEX, _FACTOR = 8, 4


@dataclass(frozen=True, slots=True)
class Shapes:
    """One call of `tunesmith::linear_cross_entropy` with class targets: hidden [rows, features] in `dtype`, weight
    [vocab, features], bias [vocab] or None. device: "cpu" or "cuda"; backend: "torch", "cpu" or "triton".
    all_rows: no target is ignored; where one is, the others' rows are copied out. rows: the labelled ones, and as
    many as hidden has; where more are ignored this bounds from above."""

    rows: int
    features: int
    vocab: int
    dtype: torch.dtype
    weight: torch.dtype
    bias: torch.dtype | None
    wanted: Wanted
    device: str
    backend: str
    all_rows: bool = True

    @property
    def chunk(self) -> int:
        """Rows of a chunk's product, the last one's apart."""
        padded = pads(self.dtype, self.device)
        return chunk_rows(self.rows, self.vocab, self.dtype.itemsize, self.device, padded=padded)

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.chunk) if self.rows else 0

    @property
    def last(self) -> int:
        """Rows of the last chunk."""
        return self.rows - max(0, self.chunks - 1) * self.chunk

    @property
    def product_rows(self) -> int:
        """Rows of all chunks' products: on the CPU more than those that are labelled, in 16 bits."""
        return self.rows - self.last + product_rows(self.last, self.dtype, self.device)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Bytes that the operator needs at its peak beside what it is given and returns. logits: what is as large as a
    chunk's logits; rest: the weight in hidden's dtype, sums in fp32, their tiles, the rows that are copied out."""

    logits: int
    rest: int

    @property
    def total(self) -> int:
        return self.logits + self.rest


def workspace(call: Shapes) -> Workspace:
    """What torch's allocator hands out within the operator: the largest of its moments. Without what a library of
    matrix products takes for itself (oneDNN's packed bf16 operands, cuBLAS' workspace)."""
    if call.rows == 0:
        return Workspace(0, 0)
    size, item = call.dtype.itemsize, call.vocab * call.features
    whole = sum_dtype(call.weight, call.dtype, call.chunks)
    returned = torch.float32 if call.dtype == torch.float16 else call.weight
    of_weight = whole.itemsize * item if call.wanted.weight and whole != returned else 0
    of_bias = 4 * call.vocab if call.wanted.bias and call.bias not in (None, torch.float32) else 0
    if call.dtype == torch.float16:
        of_bias = 0
    held = of_weight + of_bias
    held += size * item if call.weight != call.dtype else 0
    held += size * call.vocab if call.bias not in (None, call.dtype) else 0
    held += _FACTOR * call.rows if call.wanted else 0
    held += 0 if call.all_rows else _INDEX * call.rows
    # until the end, what will be returned in another dtype is not there yet
    later = returned.itemsize * item if of_weight else 0
    later += call.bias.itemsize * call.vocab if of_bias and call.bias is not None else 0
    buffer = call.chunk * call.vocab * size
    last = call.last, call.product_rows - call.rows + call.last
    chunks = [last] if call.chunks == 1 else [(call.chunk, call.chunk), last]
    moments = [
        Workspace(buffer + logits, held + rest - later)
        for rows, padded in chunks
        for logits, rest in _moments(call, whole, rows, padded)
    ]
    if call.chunks > 1:  # the last chunk's rows, those before it still there
        moments.append(Workspace(buffer, held + sum(_copied(call, *one) for one in chunks) - later))
    if call.chunks > 2 and not call.all_rows:
        moments.append(Workspace(buffer, held + 2 * _copied(call, *chunks[0]) - later))
    end = held + _copied(call, *last)
    return max([*moments, Workspace(buffer, end)], key=lambda one: one.total)


def _copied(call: Shapes, rows: int, padded: int) -> int:
    """A chunk's hidden states and statistics, where they are not views of the batch. rows: its own; padded: those of
    its product."""
    states = padded * call.features * call.dtype.itemsize
    if call.all_rows:
        return states if padded > rows else 0
    return states + rows * _STATS


def _moments(call: Shapes, whole: torch.dtype, rows: int, padded: int) -> list[tuple[int, int]]:
    """(logits, rest) of a chunk's row kernel, and of its share in each gradient."""
    size = call.dtype.itemsize
    copied = _copied(call, rows, padded)
    per_logit, per_row = _TORCH_ROWS if call.backend == "torch" else (0, 0)
    inputs = 0 if call.all_rows else rows * (_INDEX + _FACTOR * bool(call.wanted))
    found = [(per_logit * rows * call.vocab, copied + inputs + per_row * rows)]
    if call.wanted.hidden and (padded > rows or not call.all_rows):
        found.append((0, copied + padded * call.features * size))
    if call.wanted.weight and whole != call.dtype and call.device == "cpu":
        logits, rest = _tiles(call, padded)
        found.append((logits, copied + rest))
    if call.wanted.bias:
        # torch's sum on the CPU casts its input first where the result is of another dtype
        cast = 4 * padded * call.vocab if call.device == "cpu" and size != 4 else 0
        found.append((cast, copied + 4 * call.vocab))
    return found


def _tiles(call: Shapes, rows: int) -> tuple[int, int]:
    """(logits, rest) of a 16-bit product of so many rows that is added to fp32 sums a tile of classes at a time: to be
    added it is cast."""
    tile = min(tile_classes(call.features, call.dtype.itemsize), call.vocab)
    if call.dtype == torch.float16:
        return 4 * rows * tile, 4 * call.features * (tile + rows)
    cast = 4 * tile if call.chunks > 1 else 0
    return 0, call.features * (call.dtype.itemsize * tile + cast)


def flops(call: Shapes) -> int:
    """Of the products: logits, and the gradients of hidden and weight."""
    return 2 * call.product_rows * call.vocab * call.features * (1 + call.wanted.hidden + call.wanted.weight)


def moved_bytes(call: Shapes) -> int:
    """Read and written in the memory: the logits by each product and twice by the row kernel; weight and its gradient
    once per chunk and product."""
    size, item = call.dtype.itemsize, call.vocab * call.features
    hidden, weight = int(call.wanted.hidden), int(call.wanted.weight)
    logits = call.product_rows * call.vocab * size * (3 + hidden + weight)
    states = call.product_rows * call.features * size * (1 + hidden + weight)
    sums = sum_dtype(call.weight, call.dtype, call.chunks).itemsize * item * max(0, 2 * call.chunks - 1)
    return logits + states + call.chunks * size * item * (1 + hidden) + weight * sums
