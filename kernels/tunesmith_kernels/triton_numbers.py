"""What Triton kernels share on the device: bfloat16 as integers, and the numbers of stochastic rounding.

bfloat16 tensors are handed to a kernel as 16-bit integers (`tensor.view(torch.int16)`, or a pointer of that type from
a table) and all arithmetic is fp32: triton's interpreter computes bfloat16 wrongly and truncates where hardware
rounds, while integer operations are the same everywhere. The random numbers are those of `adamw.rounding` and of the
C++ path, bit for bit. Importing this module needs triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widened(bits: tl.tensor):
    """fp32 values of bfloat16 ones. bits: their bits, uint16 or int16."""
    return (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def rounded_nearest(value: tl.tensor):
    """The bits (uint16) of fp32 `value` rounded to bfloat16, ties to even, as torch rounds: overflow gives Inf;
    NaN stays NaN."""
    bits = value.to(tl.uint32, bitcast=True)
    high = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return tl.where(value != value, (bits >> 16) | 0x40, high).to(tl.uint16)


@triton.jit
def rounded_stochastic(value: tl.tensor, random: tl.tensor):
    """The bits (uint16) of fp32 `value` rounded to one of its two neighbours in bfloat16, to the farther from zero
    with a probability of the share of the way to it. random: uint32 below 2^16.

    What would round beyond the greatest finite number is truncated to it instead; Inf stays, NaN stays NaN."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # from the greatest finite bfloat16 on nothing is added, so that nothing finite becomes infinite
    high = (bits + tl.where(magnitude < 0x7F7F0000, random, 0)) >> 16
    return tl.where(magnitude > 0x7F800000, high | 0x40, high).to(tl.uint16)


@triton.jit
def mix32(x: tl.tensor):
    """A bijection of uint32 that mixes well: Chris Wellons' lowbias32 (public domain)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def stream_key(seed_low: tl.tensor, seed_high: tl.tensor, step: tl.tensor, stream: tl.tensor):
    """The key (uint32) of the random numbers of one update of one parameter, from integers: the halves of the
    64-bit seed, the number of the update being made (from 1), the parameter's stream."""
    key = mix32(seed_low.to(tl.uint32) ^ 0x9E3779B9)
    key = mix32(key ^ seed_high.to(tl.uint32))
    key = mix32(key ^ step.to(tl.uint32))
    return mix32(key ^ stream.to(tl.uint32))


@triton.jit
def random_pair(key: tl.tensor, first: tl.tensor, size: tl.constexpr):
    """Two vectors of size uint32 random numbers, for the elements first, first + 1, …, keyed by `key` and each
    element's 64-bit index. key: uint32; first: int64, not negative.

    The index's high half changes within the vector at most once, so that its key is mixed per vector, not per
    element."""
    low = first.to(tl.uint32)
    high = (first >> 32).to(tl.uint32)
    index = low + tl.arange(0, size).to(tl.uint32)
    keys = tl.where(index < low, mix32(key ^ (high + 1)), mix32(key ^ high))
    one = mix32(mix32(index + keys) ^ keys)
    other = mix32(one ^ keys ^ 0x85EBCA6B)
    return one, other
