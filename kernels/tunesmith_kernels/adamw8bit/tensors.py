"""What a step of 8-bit AdamW works on: the tensors and numbers of the parameter groups, as every path takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tunesmith_kernels.adamw8bit.codebook import Books


@dataclass(frozen=True)
class Group:
    """Tensors of one dtype and device that share their hyperparameters and the form of their moments. All lists have
    one entry per tensor, and the tensors of an entry one number of elements n; they are contiguous and, but for the
    gradients, updated in place.

    params, grads: fp32 or bf16.
    states1, states2: the first and the second moments. With `books`: uint8 codes, block by block of `block_size`
        elements (the last may be shorter). Without: fp32.
    absmaxes1, absmaxes2: with `books`, fp32 [⌈n / block_size⌉], what the values of a block's codes are multiplied
        by; without, none.
    steps: 0-dim fp32 on the parameters' device, how many updates were made before this one.
    books: None: the moments are fp32.
    stochastic: whether bf16 parameters are rounded stochastically (adamw/rounding.py) rather than to the nearest.
    streams, offsets: where stochastic rounding draws its numbers: which parameter of the model, and the index of
        the first element here within the whole of it (not 0 for a shard).
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states1: Sequence[Tensor]
    states2: Sequence[Tensor]
    absmaxes1: Sequence[Tensor]
    absmaxes2: Sequence[Tensor]
    steps: Sequence[Tensor]
    books: Books | None
    block_size: int
    stochastic: bool
    streams: Sequence[int]
    offsets: Sequence[int]
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Numbers:
    """What the update of one tensor multiplies with, besides the group's own numbers."""

    step_size: float  # lr / (1 - β1ᵗ)
    root_correction2: float  # √(1 - β2ᵗ)


def numbers(group: Group, step: int) -> Numbers:
    """step: the number of the update being made, from 1."""
    return Numbers(group.lr / (1 - group.beta1**step), math.sqrt(1 - group.beta2**step))


class Path(Protocol):
    """One way to compute: plain torch, C++ on the CPU, or Triton. The norm is that of `adamw.tensors.Path`."""

    def update(self, groups: Sequence[Group], coefficient: Tensor, skip: Tensor, seed: int) -> None:
        """One AdamW update (Loshchilov and Hutter 2019) with the gradients × `coefficient`, and none at all where
        `skip` is not 0: then every tensor stays as it is, bit for bit. The gradients are only read.

        As torch.optim.AdamW and bitsandbytes' AdamW8bit have it, with t the number of this update:

            m = β1 m + (1 - β1) g        v = β2 v + (1 - β2) g²
            p = (1 - lr λ) p - lr / (1 - β1ᵗ) · m / (√v / √(1 - β2ᵗ) + ε)

        The parameter is updated with the moments as computed; only then are they encoded. All in fp32: a bf16
        parameter is rounded at the end, to the nearest (ties to even) or stochastically. bitsandbytes' kernels for
        fp32 moments and for CUDA multiply the last fraction's two sides by √(1 - β2ᵗ): the same number.

        coefficient, skip: 0-dim fp32 on the tensors' device; never read on the host by the Triton path.
        """
        ...
