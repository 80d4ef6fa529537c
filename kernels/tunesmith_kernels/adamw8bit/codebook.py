"""The code books of 8-bit moments: dynamic quantisation (Dettmers 2015, "8-Bit Approximations for Parallelism in
Deep Learning", arXiv 1511.04561, section 1.3; block-wise: Dettmers et al. 2021, arXiv 2110.02861, section 2).

A code book is 256 numbers in [-1, 1], ascending: 0, 1, and in each of seven decades up to 1 as many as the bits that
its exponent leaves, at the middles of equal parts. A block of numbers is kept as the code of each number ÷ the
block's largest magnitude. The code is the nearest one; of two equally near, the lower; but a second moment above 0
never gets the code of 0. As 0 it would leave a first moment to be divided by ε alone, where its element's gradient is
by then a small one: an update a thousand times too large. As the least value above 0 it only damps the update.
(bitsandbytes' CPU code does the like, with 1.5e-5 as the least value; its CUDA code does not.)"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

CODES = 256
_DECADES = 7
_CODE_SHIFT = 24  # a bucket's entry: its code above, the threshold's low bits below
# bucket 0 holds all that is below; the smallest thresholds of the dynamic books are 1.6e-7 and 2.75e-7
_SMALLEST_EXPONENT = -23


def dynamic_map(*, signed: bool) -> Tensor:
    """The dynamic code book, fp32 [256], ascending: bit for bit the `qmap1` (signed) and `qmap2` (unsigned) that
    bitsandbytes keeps in its optimizers' states."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(_DECADES):
        parts = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, parts + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2 * 10 ** (decade - _DECADES + 1)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


@dataclass(frozen=True, eq=False)
class Codebook:
    """What encodes into a map and decodes from it. All tensors are on one device.

    values: fp32 [256], ascending.
    bounds: fp32 [257]; the code of x is the c with bounds[c] < x ≤ bounds[c + 1]. They are −∞, the middles of
        neighbouring values, rounded down to fp32 (no fp32 number lies between the two), and ∞; if there are no values
        below 0, the first middle is replaced by 0.
    buckets: int32; the C++ path's table, see `_buckets`.
    shift: how many low bits of a number do not choose its bucket.
    signed: whether there are values below 0.
    """

    values: Tensor
    bounds: Tensor
    buckets: Tensor
    shift: int
    signed: bool

    def to(self, device: torch.device) -> Codebook:
        return Codebook(
            self.values.to(device), self.bounds.to(device), self.buckets.to(device), self.shift, self.signed
        )


@dataclass(frozen=True)
class Books:
    """The code books of a parameter's moments: `signed` for the first, `unsigned` for the second."""

    signed: Codebook
    unsigned: Codebook


@functools.cache
def standard_books(device: torch.device) -> Books:
    """The dynamic code books on `device`."""
    return Books(
        from_map(dynamic_map(signed=True)).to(device), from_map(dynamic_map(signed=False)).to(device)
    )


def from_map(values: Tensor) -> Codebook:
    """The code book with these values, fp32 [256], on their device. Raises ValueError unless they are a dynamic map's,
    give or take what another machine rounds differently: the paths find codes by where its values lie."""
    on_host = values.detach().cpu()
    if on_host.dtype != torch.float32 or on_host.shape != (CODES,):
        raise ValueError(f"a map of 8-bit codes is fp32 [{CODES}], not {values.dtype} {list(values.shape)}")
    expected = dynamic_map(signed=bool(on_host[0] < 0))
    if not torch.allclose(on_host, expected, rtol=1e-5, atol=0) or float(on_host.abs().amax()) > 1:
        raise ValueError(
            "only dynamic maps of 8-bit codes are supported, as bitsandbytes' create_dynamic_map"
        )
    middles = (on_host[:-1].double() + on_host[1:].double()) / 2
    thresholds = middles.float()
    below = torch.nextafter(thresholds, torch.tensor(-math.inf))
    thresholds = torch.where(thresholds.double() > middles, below, thresholds)
    signed = bool(on_host[0] < 0)
    if not signed:
        thresholds[0] = 0.0
    shift = 17 if signed else 16
    infinity = torch.tensor([math.inf])
    bounds = torch.cat([-infinity, thresholds, infinity])
    return Codebook(on_host, bounds, _buckets(thresholds, shift, signed), shift, signed).to(values.device)


def bucket_range(shift: int) -> tuple[int, int]:
    """What is subtracted from the top bits of a magnitude to get its bucket, and the number of buckets of one sign:
    bucket 0 is everything too small, the last one begins at 1."""
    first = ((_SMALLEST_EXPONENT + 127) << (23 - shift)) - 1
    return first, (127 << (23 - shift)) - first + 1


def _buckets(thresholds: Tensor, shift: int, signed: bool) -> Tensor:
    """int32 [buckets], the positive numbers' and then the negative numbers'. thresholds: the finite bounds.

    The numbers of a bucket share their sign and all bits above the lowest `shift`, and at most one threshold lies among
    them. An entry is the code of the number nearest to 0 in the bucket, << 24, | the largest low bits that still have
    this code. Beyond, the code is one more for a positive number, one less for a negative one. (The first bucket, where
    not all bits above are shared, has no threshold but, in the unsigned book, 0: the caller sees to it.)"""
    first, count = bucket_range(shift)
    starts = (torch.arange(count, dtype=torch.int32) + first) << shift
    starts[0] = 0
    width = (1 << shift) - 1
    ends = ((torch.arange(count, dtype=torch.int32) + first) << shift) | width
    ends[-1] = starts[-1]  # nothing is beyond 1
    entries: list[Tensor] = []
    for sign in (1.0, -1.0) if signed else (1.0,):
        near = torch.bucketize(starts.view(torch.float32) * sign, thresholds)
        far = torch.bucketize(ends.view(torch.float32) * sign, thresholds)
        assert int((near - far).abs().amax()) <= 1
        # the last number of the bucket with the code of the first one: a threshold itself has the lower code
        crossed = thresholds[torch.minimum(near, far).clamp(max=CODES - 2)].abs().view(torch.int32)
        last = (crossed & width) if sign > 0 else (crossed - 1) & width
        entries.append((near.int() << _CODE_SHIFT) | torch.where(near == far, width, last))
    return torch.cat(entries)
