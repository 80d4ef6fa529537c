"""Stochastic rounding of fp32 to bfloat16 from a counter-based generator. The same integers come out of the C++
(`native/rounding.h`) and Triton paths.

The 16 bits that decide how an element is rounded are a function of (seed, number of the update, parameter, index of
the element in the whole parameter) and of nothing else, so a resumed run and another sharding round alike. Adding 16
uniform bits below bfloat16's last place and cutting them off rounds up with the probability that is the part cut
off: the expectation is the value (Gupta et al., "Deep Learning with Limited Numerical Precision", 2015).

`mix32` is lowbias32 of Chris Wellons' hash-prospector (public domain): a bijection of 32-bit integers, so no two
elements of a parameter (of its 2³², that is) draw from one word."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_IntOrTensor = TypeVar("_IntOrTensor", int, Tensor)


class Draws(NamedTuple):
    """16 random bits per element for the parameter and for its first and second moments: int32, in 0 .. 65535. None
    where nothing is rounded."""

    param: Tensor | None
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None


def mix32(x: _IntOrTensor) -> _IntOrTensor:
    """A 32-bit integer, or an int64 tensor of them, mixed."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def rounding_key(seed: int, step: int, stream: int) -> int:
    """The key of one update of one parameter.

    seed: 64 bits count. step: the number of the update being made, from 1. stream: which parameter.
    """
    key = mix32((seed & _WORD) ^ 0x9E3779B9)
    key = mix32(key ^ (seed >> 32 & _WORD))
    key = mix32(key ^ (step & _WORD))
    return mix32(key ^ (stream & _WORD))


def draws(key: int, first: int, count: int, device: torch.device) -> Draws:
    """The bits of the elements with the global indices first .. first + count − 1."""
    index = torch.arange(first, first + count, dtype=torch.int64, device=device)
    keys = mix32((index >> 32) ^ key)
    one = mix32(mix32(((index & _WORD) + keys) & _WORD) ^ keys)
    two = mix32(one ^ 0x85EBCA6B ^ keys)
    return Draws((one & 0xFFFF).int(), (one >> 16).int(), (two & 0xFFFF).int())


def round_stochastically(value: Tensor, draw: Tensor) -> Tensor:
    """value, fp32, to one of its two bfloat16 neighbours; what bfloat16 holds exactly stays.

    A finite value never becomes infinite (beyond bfloat16's largest it is cut off); infinities stay, NaN becomes a
    quiet NaN. draw: int32 in 0 .. 65535, of value's shape.
    """
    bits = value.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    # from the largest bfloat16 on nothing is added: no carry into infinity, nor through a NaN
    rounded = (bits + draw * (magnitude < 0x7F7F0000)) >> 16
    quieted = rounded | ((magnitude > 0x7F800000).int() << 6)
    return quieted.to(torch.int16).view(torch.bfloat16)
