"""A row of logits in Triton: read, scaled and capped, written. Importing this module needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

from tunesmith_kernels.triton_numbers import rounded_nearest, widened


@triton.jit
def load_logits(pointers: tl.tensor, mask: tl.tensor):
    """Logits in fp32; anything outside the mask. bfloat16 ones come as int16."""
    x = tl.load(pointers, mask=mask)
    if pointers.dtype.element_ty == tl.int16:  # pyright: ignore[reportAttributeAccessIssue]
        return widened(x)
    return x.to(tl.float32)


@triton.jit
def store_logits(pointers: tl.tensor, value: tl.tensor, mask: tl.tensor, interpreted: tl.constexpr):
    """fp32 `value` in the dtype of the logits, rounded once."""
    if pointers.dtype.element_ty != tl.int16:  # pyright: ignore[reportAttributeAccessIssue]
        bits = value.to(pointers.dtype.element_ty)  # pyright: ignore[reportAttributeAccessIssue]
    elif interpreted:
        bits = rounded_nearest(value).to(tl.int16, bitcast=True)  # the interpreter's own conversion truncates
    else:
        bits = value.to(tl.bfloat16).to(tl.int16, bitcast=True)  # cvt.rn: to the nearest even
    tl.store(pointers, bits, mask=mask)


@triton.jit
def shaped(x: tl.tensor, scale: tl.tensor, softcap: tl.tensor, capped: tl.constexpr, scaled: tl.constexpr):
    """z = cap·tanh(scale·x/cap), or scale·x where it is not `capped`; and ∂z/∂x but for the factor `scale`."""
    slope = 1.0
    if capped:
        t, slope = _tanh(x * (scale / softcap))  # pyright: ignore[reportGeneralTypeIssues]
        x = t * softcap
    elif scaled:
        x *= scale
    return x, slope


@triton.jit
def _tanh(x: tl.tensor):
    """tanh x, and its slope 1 − tanh² x. Below 0.625 after the Cephes library (Moshier); above, from 1 − tanh |x|, so
    that neither loses digits where it saturates."""
    square, size = x * x, tl.abs(x)
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    near = p * square * x + x
    e = tl.exp(-2.0 * size)
    rest = 2.0 * e / (1.0 + e)
    far = tl.where(x < 0, rest - 1.0, 1.0 - rest)
    small = size < 0.625
    return tl.where(small, near, far), tl.where(small, 1.0 - near * near, rest * (2.0 - rest))
