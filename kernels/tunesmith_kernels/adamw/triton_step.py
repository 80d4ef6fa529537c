"""AdamW in Triton: two launches for the norm, one for what follows from it, and one for the update of all tensors of
one precision, whatever their hyperparameters. The host never waits for the device.

The tables of addresses that the kernels read are kept on the device from step to step while the same tensors come
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
import triton.language as tl
from torch import Tensor

from tunesmith_kernels import triton_support
from tunesmith_kernels.adamw import triton_kernels
from tunesmith_kernels.adamw.tensors import Group, Precision


@dataclass(frozen=True)
class Config:
    """How a kernel is launched. chunk_size: elements of a program; block: of one of its turns."""

    chunk_size: int
    block: int
    num_warps: int


# Every capability gets the same: 8 elements per thread and turn keep the memory busy, and the longer chunks spread
# what a program does once over more elements.
NORM = Config(chunk_size=32768, block=2048, num_warps=8)
UPDATE = Config(chunk_size=8192, block=1024, num_warps=4)
FINISH_BLOCK = 1024
FINISH_WARPS = 8

_ALIGNED_BYTES = 16


def norm(grads: Sequence[Tensor]) -> Tensor:
    """See `Path.norm`: fp32 within a chunk of a tensor, fp64 over the chunks. bfloat16 and fp32 gradients may be
    mixed; those below 1e-28 count as 0."""
    device = grads[0].device
    rows, counts = array("q"), array("q")
    for grad in grads:
        assert grad.is_contiguous()
        assert grad.dtype in (torch.bfloat16, torch.float32)
        address = grad.data_ptr()
        rows.extend((address, grad.numel(), grad.dtype == torch.bfloat16, address % _ALIGNED_BYTES == 0))
        counts.append(_chunks(grad.numel(), NORM.chunk_size))
    stream, programs = triton_support.stream_of(device), sum(counts)
    partial = torch.empty((programs, 2), dtype=torch.float32, device=device)
    triton_support.launch(
        triton_kernels.sum_squares,
        programs,
        device,
        _integers(device, stream, rows.tobytes()),
        _chunk_table(device, stream, counts.tobytes()),
        partial,
        chunk_size=NORM.chunk_size,
        block=NORM.block,
        num_warps=NORM.num_warps,
        num_stages=1,
    )
    result = torch.empty((), dtype=torch.float32, device=device)
    triton_support.launch(
        triton_kernels.finish_norm,
        1,
        device,
        partial,
        result,
        programs,
        block=FINISH_BLOCK,
        num_warps=FINISH_WARPS,
        num_stages=1,
    )
    return result


def clip(norm: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """The coefficient by which torch.nn.utils.clip_grad_norm_ would scale the gradients, and a skip that is not 0
    where the norm is not finite: what `update` takes, in one launch where torch's operators take five."""
    coefficient, skip = torch.empty_like(norm), torch.empty_like(norm)
    stream = triton_support.stream_of(norm.device)
    triton_support.launch(
        triton_kernels.clip_scale,
        1,
        norm.device,
        norm,
        _floats(norm.device, stream, array("f", [max_norm]).tobytes()),
        coefficient,
        skip,
        num_warps=1,
        num_stages=1,
    )
    return coefficient, skip


@dataclass
class _Work:
    """What one launch of the update does: the tables' rows, flat."""

    rows: array[int] = field(default_factory=lambda: array("q"))
    counts: array[int] = field(default_factory=lambda: array("q"))
    numbers: array[float] = field(default_factory=lambda: array("f"))


def update(groups: Sequence[Group], coefficient: Tensor, skip: Tensor, seed: int) -> None:
    """See `Path.update`: one launch per precision and type of the moments."""
    device = coefficient.device
    works: dict[tuple[Precision, torch.dtype], _Work] = {}
    for group in groups:
        if group.params:
            work = works.setdefault((group.precision, group.exp_avgs[0].dtype), _Work())
            number = len(work.numbers) // triton_kernels.NUMBERS.value
            work.numbers.extend(_numbers(group))
            for row in _rows(group, number):
                work.rows.extend(row)
                work.counts.append(row[triton_kernels.CHUNKS.value])
    stream = triton_support.stream_of(device)
    for (precision, state), work in works.items():
        triton_support.launch(
            triton_kernels.update_chunks,
            sum(work.counts),
            device,
            _integers(device, stream, work.rows.tobytes()),
            _floats(device, stream, work.numbers.tobytes()),
            _chunk_table(device, stream, work.counts.tobytes()),
            _arrived(device, stream, work.rows.tobytes()),
            coefficient,
            skip,
            triton_support.signed32(seed),
            triton_support.signed32(seed >> 32),
            precision=precision,
            state=tl.float32 if state == torch.float32 else tl.uint16,
            chunk_size=UPDATE.chunk_size,
            block=UPDATE.block,
            num_warps=UPDATE.num_warps,
            num_stages=1,
        )


def _chunks(numel: int, chunk_size: int) -> int:
    """At least one, so that the step of an empty shard is counted too."""
    return max(1, -(-numel // chunk_size))


def _numbers(group: Group) -> tuple[float, ...]:
    """A row of the groups' table. The differences are taken in fp64: in fp32, 1 − 0.999 is off by 1e-5 of itself."""
    return (
        group.lr,
        group.lr * group.weight_decay,
        1 - group.beta1,
        1 - group.beta2,
        group.beta2,
        group.eps,
        *split_log(group.beta1),
        *split_log(group.beta2),
    )


def split_log(beta: float) -> tuple[float, float]:
    """ln β as a number of 12 bits, whose products with steps below 4096 are exact in fp32, and the rest. β = 0 gives
    −100, which is as good: exp(−100) vanishes beside 1."""
    log = math.log(beta) if beta > 0 else -100.0
    (bits,) = struct.unpack("<I", struct.pack("<f", log))
    (high,) = struct.unpack("<f", struct.pack("<I", bits & 0xFFFFF000))
    return high, log - high


def _rows(group: Group, number: int) -> Iterator[tuple[int, ...]]:
    """The rows of the update's table for one group, whose row of numbers is `number`."""
    plain = torch.float32 if group.precision == "fp32" else torch.bfloat16
    extra_dtype = torch.float32 if group.precision == "master" else torch.bfloat16
    state = group.exp_avgs[0].dtype
    assert state in ((torch.bfloat16,) if group.precision == "kahan" else (torch.bfloat16, torch.float32))
    extras = group.extras or [None] * len(group.params)
    columns = (group.params, group.grads, group.exp_avgs, group.exp_avg_sqs, extras, group.steps)
    dtypes = (plain, plain, state, state, extra_dtype)
    for *tensors, step, stream, offset in zip(*columns, group.streams, group.offsets, strict=True):
        numel = tensors[0].numel()
        addresses: list[int] = []
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            assert tensor is None or (tensor.dtype, tensor.numel()) == (dtype, numel)
            assert tensor is None or tensor.is_contiguous()
            addresses.append(0 if tensor is None else tensor.data_ptr())
        aligned = all(address % _ALIGNED_BYTES == 0 for address in addresses)
        chunks = _chunks(numel, UPDATE.chunk_size)
        yield (*addresses, step.data_ptr(), numel, aligned, chunks, stream, offset, number)


# Kept from step to step, for a stream of a device. The keys hold addresses, so an entry is found only where it is
# right; what zero_grad frees comes back at one of a few addresses.
_KEPT = 16


@functools.lru_cache(_KEPT)
def _integers(device: torch.device, stream: int, values: bytes) -> Tensor:
    return triton_support.to_device(torch.frombuffer(bytearray(values), dtype=torch.int64), device)


@functools.lru_cache(_KEPT)
def _floats(device: torch.device, stream: int, values: bytes) -> Tensor:
    return triton_support.to_device(torch.frombuffer(bytearray(values), dtype=torch.float32), device)


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
