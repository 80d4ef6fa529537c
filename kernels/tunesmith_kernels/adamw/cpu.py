"""AdamW in C++ (`native/adamw.cpp`): one pass over the gradients for the norm and one over everything for the update,
across all tensors at once, on torch's threads. Bitwise the results of `reference`, whatever the number of threads."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tunesmith_kernels import native
from tunesmith_kernels.adamw.reference import clip
from tunesmith_kernels.adamw.tensors import Group


@dataclass(frozen=True)
class _Library:
    norm: Any
    adamw: Any


@functools.cache
def _library() -> _Library:
    library = native.library()
    norm, adamw = library.tunesmith_gradient_norm, library.tunesmith_adamw
    table, count = ctypes.c_void_p, ctypes.c_int64
    norm.restype = ctypes.c_double
    norm.argtypes = [table, count, ctypes.c_int]
    adamw.restype = None
    adamw.argtypes = [table, count, table, ctypes.c_float, ctypes.c_uint64, ctypes.c_int]
    return _Library(norm, adamw)


__all__ = ["clip", "norm", "update"]


def norm(grads: Sequence[Tensor]) -> Tensor:
    """See `Path.norm`; the sum is in fp64 over a fixed partition."""
    table = array("q")
    for grad in grads:
        table.extend((grad.data_ptr(), grad.numel(), grad.dtype == torch.bfloat16))
    value = _library().norm(table.buffer_info()[0], len(grads), torch.get_num_threads())
    return torch.tensor(value, dtype=torch.float32)


def update(groups: Sequence[Group], coefficient: Tensor, skip: Tensor, seed: int) -> None:
    """See `Path.update`."""
    if skip.item() != 0:
        return
    table, settings, count = _table(groups), array("d"), sum(len(group.params) for group in groups)
    for group in groups:
        settings.extend(
            (_precision(group), group.lr, group.beta1, group.beta2, group.eps, group.weight_decay)
        )
    _library().adamw(
        table.buffer_info()[0],
        count,
        settings.buffer_info()[0],
        coefficient.item(),
        seed & 0xFFFFFFFFFFFFFFFF,
        torch.get_num_threads(),
    )


def _precision(group: Group) -> int:
    """The number in native/adamw.cpp's Precision."""
    match group.precision:
        case "fp32":
            return 0
        case "master":
            return 1
        case "stochastic":
            return 2 if group.exp_avgs[0].dtype == torch.bfloat16 else 3
        case "kahan":
            return 4


def _table(groups: Sequence[Group]) -> array[int]:
    """The columns of native/adamw.cpp's Row, one after the other."""
    columns: list[list[int]] = [[] for _ in range(10)]
    for number, group in enumerate(groups):
        count = len(group.params)
        parts = (
            _addresses(group.params),
            _addresses(group.grads),
            _addresses(group.exp_avgs),
            _addresses(group.exp_avg_sqs),
            _addresses(group.extras) or [0] * count,
            _addresses(group.steps),
            [param.numel() for param in group.params],
            group.streams,
            group.offsets,
            [number] * count,
        )
        for column, part in zip(columns, parts, strict=True):
            column.extend(part)
    return array("q", chain.from_iterable(columns))


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
