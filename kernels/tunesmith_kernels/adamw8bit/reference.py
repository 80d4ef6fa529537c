"""8-bit AdamW in plain torch: the definition that the other paths are tested against, and the one that runs where
there is neither a compiler nor Triton. The formula is in `tensors.Path.update`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith_kernels.adamw.rounding import draws, round_stochastically, rounding_key
from tunesmith_kernels.adamw8bit.codebook import Codebook
from tunesmith_kernels.adamw8bit.tensors import Group, Numbers, numbers

_PIECE = 1 << 20  # elements at a time, at most: bounds the temporaries


@torch.no_grad()
def update(groups: Sequence[Group], coefficient: Tensor, skip: Tensor, seed: int) -> None:
    """See `Path.update`. Waits for the device: it reads `skip` and the step counters."""
    if skip.item() != 0:
        return
    for group in groups:
        for index, count in enumerate(group.steps):
            count += 1
            step = int(count.item())
            rounding = _Rounding(rounding_key(seed, step, group.streams[index]), group.offsets[index])
            _update_tensor(group, index, numbers(group, step), coefficient, rounding)


@dataclass(frozen=True)
class _Rounding:
    key: int
    offset: int


def _update_tensor(group: Group, index: int, own: Numbers, coefficient: Tensor, rounding: _Rounding) -> None:
    books = group.books
    lists = (group.params, group.grads, group.states1, group.states2)
    whole = [tensors[index].detach().view(-1) for tensors in lists]
    piece = _PIECE // group.block_size * group.block_size
    for start in range(0, whole[0].numel(), piece):
        param, grad, state1, state2 = (tensor[start : start + piece] for tensor in whole)
        blocks = slice(start // group.block_size, (start + piece) // group.block_size)
        m, v = state1, state2
        if books is not None:
            m = decode(state1, group.absmaxes1[index][blocks], books.signed, group.block_size)
            v = decode(state2, group.absmaxes2[index][blocks], books.unsigned, group.block_size)
        g = grad.float() * coefficient
        m = m * group.beta1 + g * (1 - group.beta1)
        v = v * group.beta2 + (g * (1 - group.beta2)) * g
        decayed = param.float() * (1 - group.lr * group.weight_decay)
        # by way of fp64: torch's fp32 square root on the CPU is not the correctly rounded one
        root = v.double().sqrt().float()
        moved = decayed - (m * own.step_size) / (root / own.root_correction2 + group.eps)
        if books is None:
            state1.copy_(m)
            state2.copy_(v)
        else:
            encode(m, books.signed, group.block_size, state1, group.absmaxes1[index][blocks])
            encode(v, books.unsigned, group.block_size, state2, group.absmaxes2[index][blocks])
        if group.stochastic and param.dtype == torch.bfloat16:
            drawn = draws(rounding.key, rounding.offset + start, param.numel(), param.device).param
            assert drawn is not None
            moved = round_stochastically(moved, drawn)
        param.copy_(moved)


def decode(codes: Tensor, absmax: Tensor, book: Codebook, block_size: int) -> Tensor:
    """The numbers that the codes stand for, fp32 [n].

    codes: uint8 [n]. absmax: fp32 [⌈n / block_size⌉].
    """
    scales = absmax.repeat_interleave(block_size)[: codes.numel()]
    return book.values[codes.int()] * scales


def encode(numbers: Tensor, book: Codebook, block_size: int, codes: Tensor, absmax: Tensor) -> None:
    """Writes the nearest codes and the blocks' largest magnitudes.

    numbers: fp32 [n]. codes: uint8 [n]. absmax: fp32 [⌈n / block_size⌉].
    """
    count = numbers.numel()
    missing = absmax.numel() * block_size - count
    blocks = torch.nn.functional.pad(numbers, (0, missing)).view(-1, block_size)
    absmax.copy_(blocks.abs().amax(dim=1))
    scaled = blocks / torch.where(absmax == 0, 1.0, absmax)[:, None]
    codes.copy_(torch.bucketize(scaled, book.bounds[1:-1]).view(-1)[:count])
