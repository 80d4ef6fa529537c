"""8-bit AdamW in Triton: one launch for the tensors of one dtype and form of moments, whatever their hyperparameters.
The host never waits for the device.

The tables of addresses that the kernel reads are kept on the device from step to step while the same tensors come
again. Importing this module needs triton; ask `triton_support.why_not` first.
"""

from __future__ import annotations

import functools
import math
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith_kernels import triton_support
from tunesmith_kernels.adamw8bit import triton_kernels
from tunesmith_kernels.adamw8bit.codebook import standard_books
from tunesmith_kernels.adamw8bit.tensors import Books, Group

# Every capability gets the same. Elements of a program, and of one of its turns: 8 per thread.
CHUNK_SIZE = 8192
TURN = 1024
NUM_WARPS = 4

_ALIGNED_BYTES = 16


@dataclass(frozen=True)
class Config:
    """The kernel's constexpr arguments that follow from the size of a block."""

    chunk_size: int
    blocks: int
    num_warps: int


def config(block_size: int) -> Config:
    """How the kernel is launched. block_size: a power of 2."""
    turn = max(TURN, block_size)
    return Config(max(CHUNK_SIZE, block_size), turn // block_size, NUM_WARPS * turn // TURN)


@dataclass
class _Work:
    """What one launch does: its books and the tables' rows, flat."""

    books: Books
    rows: array[int] = field(default_factory=lambda: array("q"))
    counts: array[int] = field(default_factory=lambda: array("q"))
    numbers: array[float] = field(default_factory=lambda: array("f"))


_Rounding = str  # the kernel's `rounding`


def update(groups: Sequence[Group], coefficient: Tensor, skip: Tensor, seed: int) -> None:
    """See `Path.update`."""
    device = coefficient.device
    works: dict[tuple[_Rounding, int, int | None], _Work] = {}
    for group in groups:
        if group.params:
            key = (_rounding(group), group.block_size, id(group.books) if group.books else None)
            work = works.setdefault(key, _Work(group.books or standard_books(device)))
            number = len(work.numbers) // triton_kernels.NUMBERS.value
            work.numbers.extend(_numbers(group))
            for row in _rows(group, number):
                work.rows.extend(row)
                work.counts.append(row[triton_kernels.CHUNKS.value])
    stream = triton_support.stream_of(device)
    for (rounding, block_size, encoded), work in works.items():
        launched = config(block_size)
        rows = work.rows.tobytes()
        triton_support.launch(
            triton_kernels.update_chunks,
            sum(work.counts),
            device,
            _table(device, stream, torch.int64, rows),
            _table(device, stream, torch.float32, work.numbers.tobytes()),
            _chunk_table(device, stream, work.counts.tobytes()),
            _arrived(device, stream, rows),
            work.books.signed.values,
            work.books.signed.bounds,
            work.books.unsigned.values,
            work.books.unsigned.bounds,
            coefficient,
            skip,
            triton_support.signed32(seed),
            triton_support.signed32(seed >> 32),
            rounding=rounding,
            encoded=encoded is not None,
            chunk_size=launched.chunk_size,
            blocks=launched.blocks,
            block_size=block_size,
            num_warps=launched.num_warps,
            num_stages=1,
        )


def _rounding(group: Group) -> _Rounding:
    if group.params[0].dtype == torch.float32:
        return "none"
    return "stochastic" if group.stochastic else "nearest"


def _numbers(group: Group) -> tuple[float, ...]:
    """A row of the groups' table. The differences are taken in fp64: in fp32, 1 − 0.999 is off by 1e-5 of itself."""
    return (
        group.lr,
        1 - group.lr * group.weight_decay,
        group.beta1,
        1 - group.beta1,
        group.beta2,
        1 - group.beta2,
        group.eps,
        *_split_log(group.beta1),
        *_split_log(group.beta2),
    )


def _split_log(beta: float) -> tuple[float, float]:
    """ln β as a number of 12 bits, whose products with steps below 4096 are exact in fp32, and the rest. β = 0 gives
    −100, which is as good: exp(−100) vanishes beside 1."""
    log = math.log(beta) if beta > 0 else -100.0
    (bits,) = struct.unpack("<I", struct.pack("<f", log))
    (high,) = struct.unpack("<f", struct.pack("<I", bits & 0xFFFFF000))
    return high, log - high


def _rows(group: Group, number: int) -> Iterator[tuple[int, ...]]:
    """The rows of the tensors' table for one group, whose row of numbers is `number`."""
    state = torch.uint8 if group.books else torch.float32
    none: list[Tensor | None] = [None] * len(group.params)
    absmaxes = (group.absmaxes1, group.absmaxes2) if group.books else (none, none)
    columns = (group.params, group.grads, group.states1, group.states2)
    chunk_size = config(group.block_size).chunk_size
    for *tensors, absmax1, absmax2, step, stream, offset in zip(
        *columns, *absmaxes, group.steps, group.streams, group.offsets, strict=True
    ):
        dtype, numel = tensors[0].dtype, tensors[0].numel()
        for tensor, expected in zip(tensors, (dtype, dtype, state, state), strict=True):
            assert (tensor.dtype, tensor.numel()) == (expected, numel)
            assert tensor.is_contiguous()
        addresses = [tensor.data_ptr() for tensor in tensors]
        aligned = all(address % _ALIGNED_BYTES == 0 for address in addresses)
        scales = [0 if absmax is None else absmax.data_ptr() for absmax in (absmax1, absmax2)]
        chunks = max(1, -(-numel // chunk_size))  # of an empty shard, too, the step is counted
        yield (*addresses, *scales, step.data_ptr(), numel, aligned, chunks, stream, offset, number)


# Kept from step to step, for a stream of a device. The keys hold addresses, so an entry is found only where it is
# right; what zero_grad frees comes back at one of a few addresses.
_KEPT = 16


@functools.lru_cache(_KEPT)
def _table(device: torch.device, stream: int, dtype: torch.dtype, values: bytes) -> Tensor:
    return triton_support.to_device(torch.frombuffer(bytearray(values), dtype=dtype), device)


@functools.lru_cache(_KEPT)
def _arrived(device: torch.device, stream: int, rows: bytes) -> Tensor:
    tensors = len(rows) // (8 * triton_kernels.COLUMNS.value)
    return torch.zeros(tensors, dtype=torch.int32, device=device)


@functools.lru_cache(_KEPT)
def _chunk_table(device: torch.device, stream: int, counts: bytes) -> Tensor:
    """(tensor, chunk of the tensor) for every program, int64, (programs, 2). counts: chunks of each tensor."""
    chunks = torch.frombuffer(bytearray(counts), dtype=torch.int64)
    tensor = torch.repeat_interleave(torch.arange(len(chunks)), chunks)
    first = torch.cumsum(chunks, 0) - chunks
    return triton_support.to_device(
        torch.stack((tensor, torch.arange(len(tensor)) - first[tensor]), dim=1), device
    )
