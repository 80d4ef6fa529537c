"""8-bit AdamW on the CPU in C++ (native/adamw8bit.cpp)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tunesmith_kernels import native
from tunesmith_kernels.adamw.rounding import rounding_key
from tunesmith_kernels.adamw8bit.codebook import Codebook, bucket_range, standard_books
from tunesmith_kernels.adamw8bit.tensors import Group, numbers

LARGEST_BLOCK = 4096  # kLargestBlock
_FP32, _BF16, _STOCHASTIC_BF16 = range(3)  # Kind


class _Book(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("buckets", ctypes.c_void_p),
        ("shift", ctypes.c_int32),
        ("first", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("negative", ctypes.c_int32),
    )


class _Entry(ctypes.Structure):
    _fields_ = (
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("state1", ctypes.c_void_p),
        ("state2", ctypes.c_void_p),
        ("absmax1", ctypes.c_void_p),
        ("absmax2", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("rounding_key", ctypes.c_uint32),
        ("step_size", ctypes.c_float),
        ("root_correction2", ctypes.c_float),
    )


class _Settings(ctypes.Structure):
    _fields_ = (
        ("beta1", ctypes.c_float),
        ("weight1", ctypes.c_float),
        ("beta2", ctypes.c_float),
        ("weight2", ctypes.c_float),
        ("decay", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("coefficient", ctypes.c_float),
        ("block_size", ctypes.c_int32),
    )


_Step = Callable[[ctypes.Array[_Entry], int, Any, Any, Any, int, int], None]


@functools.cache
def _native_step() -> _Step:
    step = native.library().tunesmith_adamw8bit_step
    pointer, int32 = ctypes.c_void_p, ctypes.c_int32
    step.argtypes = [pointer, ctypes.c_int64, pointer, pointer, pointer, int32, int32]
    step.restype = None
    return step


def update(groups: Sequence[Group], coefficient: Tensor, skip: Tensor, seed: int) -> None:
    """See `Path.update`. Raises native.Unavailable where there is no native library."""
    step = _native_step()
    if float(skip) != 0:
        return
    for group in groups:
        assert group.block_size <= LARGEST_BLOCK
        books = group.books or standard_books(coefficient.device)
        entries = (_Entry * len(group.params))(
            *(_entry(group, index, seed) for index in range(len(group.params)))
        )
        step(
            entries,
            len(entries),
            ctypes.byref(_settings(group, float(coefficient))),
            ctypes.byref(_book(books.signed)),
            ctypes.byref(_book(books.unsigned)),
            _kind(group),
            torch.get_num_threads(),
        )
        for count in group.steps:
            count += 1


def _kind(group: Group) -> int:
    if group.params[0].dtype == torch.float32:
        return _FP32
    return _STOCHASTIC_BF16 if group.stochastic else _BF16


def _book(book: Codebook) -> _Book:
    first, count = bucket_range(book.shift)
    negative = count if book.signed else 0
    return _Book(book.values.data_ptr(), book.buckets.data_ptr(), book.shift, first, count, negative)


def _settings(group: Group, coefficient: float) -> _Settings:
    return _Settings(
        beta1=group.beta1,
        weight1=1 - group.beta1,
        beta2=group.beta2,
        weight2=1 - group.beta2,
        decay=1 - group.lr * group.weight_decay,
        eps=group.eps,
        coefficient=coefficient,
        block_size=group.block_size,
    )


def _entry(group: Group, index: int, seed: int) -> _Entry:
    step = int(group.steps[index]) + 1
    own = numbers(group, step)
    return _Entry(
        param=group.params[index].data_ptr(),
        grad=group.grads[index].data_ptr(),
        state1=group.states1[index].data_ptr(),
        state2=group.states2[index].data_ptr(),
        absmax1=group.absmaxes1[index].data_ptr() if group.books else None,
        absmax2=group.absmaxes2[index].data_ptr() if group.books else None,
        numel=group.params[index].numel(),
        offset=group.offsets[index],
        rounding_key=rounding_key(seed, step, group.streams[index]),
        step_size=own.step_size,
        root_correction2=own.root_correction2,
    )
