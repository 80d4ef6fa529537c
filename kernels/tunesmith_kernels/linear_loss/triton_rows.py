"""The row kernel of the linear cross-entropy in Triton: `rows` has the formula, `native/ce_rows.cpp` the C++ form.

A program computes one row, or several where the vocabulary is small, and goes over it twice: once for every sum, with
the maximum found on the way (Milakov & Gimelshein 2018), once to write the gradient over the logits. The maximum and
the sums are kept per group of neighbouring logits, which one thread loads at once, and are joined at the end of the
row: so the loop has no barrier, and each sum few addends. The target's own exponential stays out of the sums: where the
row is nearly certain it is the others' sum that the loss and its gradient are made of.

Importing this module needs triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith_kernels import triton_support
from tunesmith_kernels.linear_loss.rows import RowInputs, RowOptions, RowOutputs
from tunesmith_kernels.triton_numbers import rounded_nearest, widened

# logits below it count as −inf, and in its place they multiply with 0
_FLOOR = tl.constexpr(-1e30)
_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Config:
    """rows: of a program; block: logits of a row that are loaded at once; group: neighbours that share a maximum."""

    rows: int
    block: int
    group: int
    num_warps: int


# bytes that a thread loads at once; rows of a program at most, and its warps where it has several rows
_LOAD_BYTES, _MOST_ROWS, _WARPS_OF_ROWS = 16, 32, 4


def config(vocab: int, itemsize: int, weighed: bool) -> Config:
    """How a vocabulary is computed whose logits have `itemsize` bytes; weighed: every class has an a (soft targets,
    smoothing), hence more sums. Chosen so that no thread runs out of registers (the tests compile every case)."""
    if vocab % 16 == 0:
        group = _LOAD_BYTES // itemsize
        per_thread = 8 if weighed else 16
    else:  # a row that begins anywhere is loaded element by element: neighbours lie in different threads
        group, per_thread = 1, 4
    warps = 8 if weighed else 16
    block = min(1 << (vocab - 1).bit_length(), 32 * warps * per_thread)
    rows = max(1, min(_MOST_ROWS, 32 * _WARPS_OF_ROWS * per_thread // block))
    return Config(rows, block, group, num_warps=max(1, rows * block // (32 * per_thread)))


def stage_count(soft: bool) -> int:
    """Blocks under way to a program's shared memory, one of them in use. A soft target's are 4 bytes per class more."""
    return 2 if soft else 3


def triton_rows(logits: Tensor, inputs: RowInputs, options: RowOptions, outputs: RowOutputs) -> None:
    """See `RowKernel`; logits on a CUDA device, or on the CPU under triton's interpreter. A target that is no class
    has a loss of NaN, and a gradient of NaN."""
    assert logits.is_contiguous()
    rows, vocab = logits.shape
    if rows == 0:
        return
    soft = inputs.target.is_floating_point()
    smoothed = options.label_smoothing != 0
    chosen = config(vocab, logits.element_size(), soft or smoothed)
    triton_support.launch(
        rows_kernel,
        -(-rows // chosen.rows),
        logits.device,
        logits.view(torch.int16) if logits.dtype == torch.bfloat16 else logits,
        inputs.target,
        inputs.class_weight,
        inputs.token_weight,
        inputs.gradient_factor,
        outputs.loss,
        outputs.log_prob,
        outputs.entropy,
        outputs.lse,
        outputs.correct.view(torch.uint8),
        rows,
        vocab,
        options.label_smoothing,
        options.z_loss,
        options.focal_gamma,
        options.softcap,
        options.scale,
        soft=soft,
        smoothed=smoothed,
        capped=options.softcap != 0,
        scaled=options.scale != 1,
        rows=chosen.rows,
        block=chosen.block,
        group=chosen.group,
        stages=stage_count(soft),
        interpreted=triton_support.interpreting(),
        num_warps=chosen.num_warps,
    )


@triton.jit
def _exp(x: tl.tensor):
    """e^x; 0 where that is below 2⁻¹²⁶, which is one instruction instead of four."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _tanh(x: tl.tensor, fine: tl.constexpr):
    """tanh x, and its slope 1 − tanh² x, from 1 − tanh |x|, so that they keep their digits where they saturate.

    Within 1e-7 of 1; where it is `fine`, within 1e-7 of itself: below 0.625 after the Cephes library (Moshier)."""
    size = tl.abs(x)
    e = _exp(-2.0 * size)
    rest = 2.0 * e / (1.0 + e)
    tanh = tl.where(x < 0, rest - 1.0, 1.0 - rest)
    slope = rest * (2.0 - rest)
    if fine:
        square = x * x
        p = -5.70498872745e-3 * square + 2.06390887954e-2
        p = p * square - 5.37397155531e-2
        p = p * square + 1.33314422036e-1
        p = p * square - 3.33332819422e-1
        near = p * square * x + x
        tanh = tl.where(size < 0.625, near, tanh)
        slope = tl.where(size < 0.625, 1.0 - near * near, slope)
    return tanh, slope


@triton.jit
def _log1p(x: tl.tensor):
    """log(1 + x) for x ≥ 0, with all digits where x is small: 2·artanh(x/(2 + x)) up to 1, log above."""
    v = tl.where(x > 1.0, 0.0, x) / (2.0 + x)
    s = v * v
    p = s * (1.0 / 13.0) + 1.0 / 11.0
    p = p * s + 1.0 / 9.0
    p = p * s + 1.0 / 7.0
    p = p * s + 1.0 / 5.0
    p = p * s + 1.0 / 3.0
    return tl.where(x > 1.0, tl.log(1.0 + x), 2.0 * v + 2.0 * v * (p * s))


@triton.jit
def _load(pointers: tl.tensor, mask: tl.tensor):
    """Logits in fp32; anything outside the mask. bfloat16 ones come as int16."""
    x = tl.load(pointers, mask=mask)
    if pointers.dtype.element_ty == tl.int16:  # pyright: ignore[reportAttributeAccessIssue]
        return widened(x)
    return x.to(tl.float32)


@triton.jit
def _store(pointers: tl.tensor, value: tl.tensor, mask: tl.tensor, interpreted: tl.constexpr):
    if pointers.dtype.element_ty != tl.int16:  # pyright: ignore[reportAttributeAccessIssue]
        bits = value.to(pointers.dtype.element_ty)  # pyright: ignore[reportAttributeAccessIssue]
    elif interpreted:
        bits = rounded_nearest(value).to(tl.int16, bitcast=True)  # the interpreter's own conversion truncates
    else:
        bits = value.to(tl.bfloat16).to(tl.int16, bitcast=True)  # cvt.rn: to the nearest even
    tl.store(pointers, bits, mask=mask)


@triton.jit
def _shaped(
    pointers: tl.tensor,
    mask: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    capped: tl.constexpr,
    scaled: tl.constexpr,
):
    """z of the logits there, and ∂z/∂x but for the factor `scale`."""
    z = _load(pointers, mask)
    slope = 1.0
    if capped:
        # 16 bits of a logit are coarser by far than the quicker tanh
        fine: tl.constexpr = tl.constexpr(pointers.dtype.element_ty == tl.float32)  # pyright: ignore[reportAttributeAccessIssue]
        z, slope = _tanh(z * (scale / softcap), fine)  # pyright: ignore[reportGeneralTypeIssues]
        z *= softcap
    elif scaled:
        z *= scale
    return z, slope


@triton.jit
def _soft_target(pointers: tl.tensor, mask: tl.tensor):
    """q. The second mask has no effect, but that triton 3.7's compiler fails on a sum of what a load gives as it is."""
    return tl.where(mask, tl.load(pointers, mask=mask, other=0.0), 0.0)


@triton.jit
def _addends(
    cols: tl.tensor,
    inside: tl.tensor,
    q: tl.tensor,
    class_weight: tl.tensor,
    smoothing: tl.tensor,
    share: tl.tensor,
    soft: tl.constexpr,
    smoothed: tl.constexpr,
):
    """a_v of the formula for soft targets; for class targets what smoothing gives every class, a_v/share."""
    a = tl.where(inside, 1.0, 0.0)
    if soft:
        a = q
        if smoothed:
            a = tl.where(inside, (1.0 - smoothing) * q + share, 0.0)
    if class_weight is not None:  # pyright: ignore[reportUnnecessaryComparison]
        a *= tl.load(class_weight + cols, mask=inside, other=0.0)
    return a


@triton.jit
def _joined(sums: tl.tensor, mass: tl.tensor, rise: tl.tensor):
    """Σ a·(max − z) of a row, from the sums of its groups; rise: the row's maximum less each group's."""
    return tl.sum(sums + mass * rise, axis=1)


@triton.jit(do_not_specialize=["count"])
def rows_kernel(
    logits: tl.tensor,
    target: tl.tensor,
    class_weight: tl.tensor | None,
    token_weight: tl.tensor | None,
    factor: tl.tensor | None,
    loss_out: tl.tensor,
    log_prob_out: tl.tensor,
    entropy_out: tl.tensor,
    lse_out: tl.tensor,
    correct_out: tl.tensor,
    count: tl.tensor,
    vocab: tl.tensor,
    smoothing: tl.tensor,
    z_loss: tl.tensor,
    gamma: tl.tensor,
    softcap: tl.tensor,
    scale: tl.tensor,
    soft: tl.constexpr,
    smoothed: tl.constexpr,
    capped: tl.constexpr,
    scaled: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    group: tl.constexpr,
    stages: tl.constexpr,
    interpreted: tl.constexpr,
):
    """`triton_rows`. logits: *fp32, *fp16, or *i16 for bfloat16, [count, vocab]; target: *i64 [count], or if
    soft *fp32 [count, vocab]; class_weight, token_weight, factor: *fp32 or None; the outputs: [count], *fp32, and
    correct_out *u8."""
    groups: tl.constexpr = tl.constexpr(block // group)
    mixed: tl.constexpr = tl.constexpr(soft and (smoothed or class_weight is not None))  # a differs from q
    weighed: tl.constexpr = tl.constexpr(soft or smoothed)  # every class has an a
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    present = row < count
    begin = logits + row * vocab
    share = smoothing / vocab
    within = tl.arange(0, groups)[None, :, None] * group + tl.arange(0, group)[None, None, :]

    label = tl.zeros([rows], tl.int32)
    z_target = tl.zeros([rows], tl.float32)
    slope_target = 1.0
    if not soft:
        wanted = tl.load(target + row, mask=present, other=0)
        valid = (wanted >= 0) & (wanted < vocab)
        label = tl.where(valid, wanted, 0).to(tl.int32)
        z_target, slope_target = _shaped(begin + label, present, scale, softcap, capped, scaled)
        z_target = tl.where(valid, z_target, float("nan"))

    # over groups: the maximum m; Σ e^(z−m), Σ e^(z−m)·(z−m); Σ a·(m−z), Σ a; Σ q·(m−z), Σ q; the greatest q, its place
    high = tl.full([rows, groups], _FLOOR, tl.float32)
    total = tl.zeros([rows, groups], tl.float32)
    weighted = tl.zeros([rows, groups], tl.float32)
    cross = tl.zeros([rows, groups], tl.float32)
    mass = tl.zeros([rows, groups], tl.float32)
    plain = tl.zeros([rows, groups], tl.float32)
    plain_mass = tl.zeros([rows, groups], tl.float32)
    best = tl.full([rows, groups], float("-inf"), tl.float32)
    place = tl.zeros([rows, groups], tl.int32)
    for start in tl.range(0, vocab, block, num_stages=stages):
        cols = start + within
        inside = (cols < vocab) & present[:, None, None]
        z, _ = _shaped(begin[:, None, None] + cols, inside, scale, softcap, capped, scaled)
        summed = inside
        if not soft:
            summed = inside & (cols != label[:, None, None])
        bounded = tl.where(summed, tl.maximum(z, _FLOOR, propagate_nan=tl.PropagateNan.ALL), _FLOOR)
        top = tl.maximum(high, tl.max(bounded, axis=2))
        below = bounded - top[:, :, None]
        e = _exp(below)
        fall = high - top
        shrink = _exp(fall)
        weighted = shrink * (weighted + total * fall) + tl.sum(e * below, axis=2)
        total = shrink * total + tl.sum(e, axis=2)
        if weighed:
            q = 0.0
            if soft:
                q = _soft_target(target + (row * vocab)[:, None, None] + cols, inside)
                likely = tl.where(inside, q, float("-inf"))
                peak = tl.max(likely, axis=2)
                at = tl.min(tl.where(likely == peak[:, :, None], cols, vocab - 1), axis=2)
                place = tl.where(peak > best, at, place)
                best = tl.maximum(best, peak)
            a = _addends(cols, summed, q, class_weight, smoothing, share, soft, smoothed)
            gap = top[:, :, None] - z
            cross += tl.sum(tl.where(a == 0, 0.0, a * gap), axis=2) - mass * fall
            mass += tl.sum(a, axis=2)
            if mixed:
                plain += tl.sum(tl.where(q == 0, 0.0, q * gap), axis=2) - plain_mass * fall
                plain_mass += tl.sum(q, axis=2)
        high = top

    row_high = tl.max(high, axis=1)
    fall = high - row_high[:, None]
    shrink = _exp(fall)
    row_others = tl.sum(shrink * total, axis=1)
    row_weighted = tl.sum(shrink * (weighted + total * fall), axis=1)
    row_top = row_high
    if not soft:
        row_top = tl.maximum(row_high, z_target)
    row_top = tl.where(row_top > _FLOOR, row_top, float("nan"))
    drop = row_high - row_top
    row_weighted = _exp(drop) * (row_weighted + row_others * drop)
    row_others *= _exp(drop)
    row_total = row_others
    own = tl.zeros([rows], tl.float32)
    if soft:
        log_total = _log1p(row_total - 1.0)
    else:
        behind = tl.maximum(z_target - row_top, _FLOOR, propagate_nan=tl.PropagateNan.ALL)
        own = _exp(behind)
        row_total += own
        row_weighted += own * behind
        # the target is the likeliest: own is 1, and stays out of the sum
        log_total = _log1p(tl.where(behind == 0, row_others, row_total - 1.0))
    lse = row_top + log_total
    entropy = log_total - row_weighted / row_total
    miss = row_others / row_total

    a_mass = tl.sum(mass, axis=1)
    rise = row_top[:, None] - high
    ce = tl.zeros([rows], tl.float32)
    a_target = tl.zeros([rows], tl.float32)
    rest = tl.zeros([rows], tl.float32)  # Σ a over the other classes
    if soft:
        ce = a_mass * log_total + _joined(cross, mass, rise)
        log_prob = -ce
        if mixed:
            log_prob = -(tl.sum(plain_mass, axis=1) * log_total + _joined(plain, plain_mass, rise))
        row_best = tl.max(best, axis=1)
        likeliest = tl.min(tl.where(best == row_best[:, None], place, vocab - 1), axis=1)
        z_likeliest, _ = _shaped(begin + likeliest, present, scale, softcap, capped, scaled)
        correct = z_likeliest >= row_top
    else:
        own_weight = tl.full([rows], 1.0, tl.float32)
        if class_weight is not None:
            own_weight = tl.load(class_weight + label)
        log_prob = tl.where(z_target == float("-inf"), z_target, behind) - log_total
        a_target = own_weight * (1.0 - smoothing + share)
        rest = share * a_mass
        ce = tl.where(a_target == 0, 0.0, -a_target * log_prob)
        if smoothed:
            ce += rest * log_total + share * _joined(cross, mass, rise)
        a_mass = rest + a_target
        correct = z_target >= row_top

    focal = tl.where(gamma == 0, 1.0, _exp(gamma * tl.log(miss)))
    s_target = own / row_total
    steep = tl.where((gamma == 0) | (miss == 0), 0.0, gamma * focal / miss * s_target * ce)
    loss = focal * ce + z_loss * lse * lse
    if token_weight is not None:
        loss *= tl.load(token_weight + row, mask=present, other=0.0)
    tl.store(loss_out + row, loss, mask=present)
    tl.store(log_prob_out + row, log_prob, mask=present)
    tl.store(entropy_out + row, entropy, mask=present)
    tl.store(lse_out + row, lse, mask=present)
    tl.store(correct_out + row, correct.to(tl.uint8), mask=present)

    if factor is not None:
        outer = tl.load(factor + row, mask=present, other=0.0) * scale
        certain = focal * a_mass + steep + 2.0 * z_loss * lse
        # (F·A + K + 2ζ·lse)·s − F·a − K, with s or 1 − s, whichever is small: there the rest does not cancel
        entry = tl.where(
            s_target < 0.5,
            certain * s_target - focal * a_target - steep,
            focal * rest + 2.0 * z_loss * lse - certain * miss,
        )
        entry *= outer * slope_target
        per_e = outer * certain / row_total
        flat = outer * focal
        if not soft:
            flat *= share
        tl.debug_barrier()  # the target's logit was read by every thread: from here on it is written to
        for start in tl.range(0, vocab, block, num_stages=stages):
            cols = start + within
            inside = (cols < vocab) & present[:, None, None]
            pointers = begin[:, None, None] + cols
            z, slope = _shaped(pointers, inside, scale, softcap, capped, scaled)
            gradient = per_e[:, None, None] * _exp(z - row_top[:, None, None])
            if weighed:
                q = 0.0
                if soft:
                    q = _soft_target(target + (row * vocab)[:, None, None] + cols, inside)
                a = _addends(cols, inside, q, class_weight, smoothing, share, soft, smoothed)
                gradient -= flat[:, None, None] * a
            gradient *= slope
            if not soft:
                gradient = tl.where(cols == label[:, None, None], entry[:, None, None], gradient)
            _store(pointers, gradient, inside, interpreted)
