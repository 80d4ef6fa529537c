"""The Triton kernels of AdamW: the sum of squares of many tensors, and the update of many tensors.

A kernel gets its tensors as a table, one row of int64 per tensor (columns below), and a table of chunks, a pair of
int64 (row, index of the chunk within the tensor) per program. All arithmetic on elements is fp32.
"""

# The type checker reads a kernel as the Python that it is not: constexpr values are what they hold.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from tunesmith_kernels.triton_numbers import (
    random_pair,
    rounded_nearest,
    rounded_stochastic,
    stream_key,
    widened,
)

# columns of the gradients' table
GRAD_ADDRESS = tl.constexpr(0)
GRAD_NUMEL = tl.constexpr(1)
GRAD_BF16 = tl.constexpr(2)
GRAD_ALIGNED = tl.constexpr(3)
GRAD_COLUMNS = tl.constexpr(4)

# columns of the update's table: addresses first, then numbers
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
EXTRA = tl.constexpr(4)
STEP = tl.constexpr(5)
NUMEL = tl.constexpr(6)
ALIGNED = tl.constexpr(7)
CHUNKS = tl.constexpr(8)
STREAM = tl.constexpr(9)
OFFSET = tl.constexpr(10)
GROUP = tl.constexpr(11)
COLUMNS = tl.constexpr(12)

# columns of the groups' table, fp32
LR = tl.constexpr(0)
DECAY = tl.constexpr(1)  # lr · weight decay
WEIGHT1 = tl.constexpr(2)  # 1 − β1
WEIGHT2 = tl.constexpr(3)
BETA2 = tl.constexpr(4)
EPS = tl.constexpr(5)
LOG1_HIGH = tl.constexpr(6)  # ln β1 as the sum of two numbers
LOG1_LOW = tl.constexpr(7)
LOG2_HIGH = tl.constexpr(8)
LOG2_LOW = tl.constexpr(9)
NUMBERS = tl.constexpr(10)

# Gradients from SPLIT on are squared after a multiplication by SHRINK, smaller ones by GROW, and summed apart: so no
# square overflows, and none underflows above 1e-28 (Blue, "A portable Fortran program to find the Euclidean norm of
# a vector", 1978; two ranges suffice where the smallest numbers may vanish). All are powers of 2.
SPLIT = tl.constexpr(2.0**23)
SHRINK = tl.constexpr(2.0**-74)
GROW = tl.constexpr(2.0**31)
UNSHRINK_SQUARED = tl.constexpr(2.0**148)
UNGROW_SQUARED = tl.constexpr(2.0**-62)


@triton.jit
def _pointer(
    row: tl.tensor, column: tl.constexpr, first: tl.tensor, dtype: tl.constexpr, align: tl.constexpr
):
    """To element `first` of the tensor whose address is in a table's row; the compiler may count on a multiple of
    `align` bytes."""
    return tl.multiple_of(tl.load(row + column).to(tl.pointer_type(dtype)) + first, align)


@triton.jit
def _read(pointer: tl.tensor, index: tl.tensor, within: tl.tensor):
    """fp32 numbers from fp32 or, where the pointer is to uint16, bfloat16; 0 where not `within`."""
    values = tl.load(pointer + index, mask=within, other=0)
    if values.dtype == tl.uint16:
        values = widened(values)
    return values


@triton.jit
def _end(count: tl.tensor, aligned: tl.constexpr):
    """count, where aligned as a value that the compiler knows to be a multiple of 8: then 8 elements share a mask."""
    return count // 8 * 8 if aligned else count


@triton.jit
def _squares(
    row: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    dtype: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """The sums of squares of the elements first .. first + count − 1 in two ranges."""
    pointer = _pointer(row, GRAD_ADDRESS, first, dtype, 16 if aligned else 1)
    small = tl.zeros((block,), tl.float32)
    large = tl.zeros((block,), tl.float32)
    end = _end(count, aligned)
    for start in range(0, count, block):
        index = start + tl.arange(0, block)
        g = _read(pointer, index, index < end)
        is_small = tl.abs(g) < SPLIT  # false for NaN
        scaled = g * tl.where(is_small, GROW, SHRINK)
        small += tl.where(is_small, scaled * scaled, 0.0)
        large += tl.where(is_small, 0.0, scaled * scaled)
    return tl.sum(small), tl.sum(large)


@triton.jit
def sum_squares(
    table: tl.tensor,
    chunks: tl.tensor,
    partial: tl.tensor,
    chunk_size: tl.constexpr,
    block: tl.constexpr,
):
    """partial (fp32, programs × 2) ← the sums of squares of each chunk: of the small elements × GROW, of the large
    ones × SHRINK."""
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(chunks + 2 * program) * GRAD_COLUMNS
    first = tl.load(chunks + 2 * program + 1) * chunk_size
    count = tl.minimum(tl.load(row + GRAD_NUMEL) - first, chunk_size).to(tl.int32)
    aligned = (tl.load(row + GRAD_ALIGNED) != 0) & (count % 8 == 0)
    if tl.load(row + GRAD_BF16) != 0:
        if aligned:
            small, large = _squares(row, first, count, tl.uint16, True, block)
        else:
            small, large = _squares(row, first, count, tl.uint16, False, block)
    else:
        if aligned:
            small, large = _squares(row, first, count, tl.float32, True, block)
        else:
            small, large = _squares(row, first, count, tl.float32, False, block)
    tl.store(partial + 2 * program, small)
    tl.store(partial + 2 * program + 1, large)


@triton.jit(do_not_specialize=["count"])
def finish_norm(partial: tl.tensor, norm: tl.tensor, count: tl.tensor, block: tl.constexpr):
    """norm ← the root of the sum of `count` pairs from `sum_squares`, in fp64: one program."""
    small = tl.zeros((block,), tl.float64)
    large = tl.zeros((block,), tl.float64)
    for start in range(0, count, block):
        index = start + tl.arange(0, block)
        small += tl.load(partial + 2 * index, mask=index < count, other=0).to(tl.float64)
        large += tl.load(partial + 2 * index + 1, mask=index < count, other=0).to(tl.float64)
    total = tl.sum(small) * UNGROW_SQUARED + tl.sum(large) * UNSHRINK_SQUARED
    tl.store(norm, tl.sqrt(total).to(tl.float32))


@triton.jit
def clip_scale(norm: tl.tensor, max_norm: tl.tensor, coefficient: tl.tensor, skip: tl.tensor):
    """coefficient ← max_norm / (norm + 1e-6), at most 1; skip ← 0, NaN where the norm is not finite: one program."""
    total = tl.load(norm)
    tl.store(coefficient, tl.minimum(tl.div_rn(tl.load(max_norm), total + 1e-6), 1.0))
    tl.store(skip, total - total)


@triton.jit
def bias_correction(step: tl.tensor, log_high: tl.tensor, log_low: tl.tensor):
    """1 − βᵗ in fp32, to 2 units in the last place: from t·ln β, by the series of the exponential where it is above
    −1 and 1 − exp would cancel."""
    x = step * log_high + step * log_low
    near = tl.maximum(x, -1.0)
    series = 1.0 + near / 12
    for divisor in tl.static_range(11, 1, -1):
        series = 1.0 + near / divisor * series
    return tl.where(x > -1.0, -near * series, 1.0 - tl.exp(x))


@triton.jit
def _update(
    row: tl.tensor,
    numbers: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    coefficient: tl.tensor,
    step: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    precision: tl.constexpr,
    state: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """The update of the elements first .. first + count − 1 of one tensor; `step` is its number, from 1. aligned:
    the addresses are multiples of 16 bytes and the count of 8."""
    plain: tl.constexpr = tl.float32 if precision == "fp32" else tl.uint16
    # bfloat16 tensors beside fp32 ones are read 4 elements at a time too: else layouts are converted in between
    align_plain: tl.constexpr = 1 if not aligned else (16 if plain == state else 8)
    align: tl.constexpr = 16 if aligned else 1
    param = _pointer(row, PARAM, first, plain, align_plain)
    grad = _pointer(row, GRAD, first, plain, align_plain)
    exp_avg = _pointer(row, EXP_AVG, first, state, align)
    exp_avg_sq = _pointer(row, EXP_AVG_SQ, first, state, align)
    if precision == "master" or precision == "kahan":
        extra = _pointer(row, EXTRA, first, state, align)

    weight1 = tl.load(numbers + WEIGHT1)
    nearer1 = tl.where(weight1 < 0.5, weight1, weight1 - 1.0)
    beta2 = tl.load(numbers + BETA2)
    weight2 = tl.load(numbers + WEIGHT2)
    decay = tl.load(numbers + DECAY)
    correction1 = bias_correction(step, tl.load(numbers + LOG1_HIGH), tl.load(numbers + LOG1_LOW))
    root2 = tl.sqrt_rn(bias_correction(step, tl.load(numbers + LOG2_HIGH), tl.load(numbers + LOG2_LOW)))
    # lr/correction1 · m / (√v/root2 + eps), with the fraction expanded by root2
    size = tl.div_rn(tl.load(numbers + LR) * root2, correction1)
    eps = tl.load(numbers + EPS) * root2
    if precision == "stochastic" or precision == "kahan":
        key = stream_key(seed_low, seed_high, step.to(tl.int32), tl.load(row + STREAM))
        origin = tl.load(row + OFFSET) + first

    end = _end(count, aligned)
    for start in range(0, count, block):
        index = start + tl.arange(0, block)
        within = index < end
        g = _read(grad, index, within) * coefficient
        m = _read(exp_avg, index, within)
        v = _read(exp_avg_sq, index, within)
        if precision == "master":
            p = _read(extra, index, within)
        else:
            p = _read(param, index, within)
            if precision == "kahan":
                p += _read(extra, index, within)
        # from the nearer end, as torch.lerp: exact where β1 is 0
        difference = g - m
        m = tl.where(weight1 < 0.5, m, g) + nearer1 * difference
        v = beta2 * v + weight2 * g * g
        if precision == "fp32" or precision == "master":
            p = p - (decay * p + size * tl.div_rn(m, tl.sqrt_rn(v) + eps))
        else:
            # p is rounded to 8 bits, far beyond what the faster root and quotient are off
            p = p - (decay * p + size * (m / (tl.sqrt(v) + eps)))

        if precision == "stochastic" or precision == "kahan":
            one, other = random_pair(key, origin + start, block)
        if state == tl.uint16:
            tl.store(exp_avg + index, rounded_stochastic(m, one >> 16), mask=within)
            tl.store(exp_avg_sq + index, rounded_stochastic(v, other & 0xFFFF), mask=within)
        else:
            tl.store(exp_avg + index, m, mask=within)
            tl.store(exp_avg_sq + index, v, mask=within)
        if precision == "fp32":
            tl.store(param + index, p, mask=within)
        elif precision == "stochastic":
            tl.store(param + index, rounded_stochastic(p, one & 0xFFFF), mask=within)
        else:
            bits = rounded_nearest(p)
            tl.store(param + index, bits, mask=within)
            if precision == "master":
                tl.store(extra + index, p, mask=within)
            else:
                tl.store(extra + index, rounded_nearest(p - widened(bits)), mask=within)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def update_chunks(
    table: tl.tensor,
    groups: tl.tensor,
    chunks: tl.tensor,
    arrived: tl.tensor,
    coefficient: tl.tensor,
    skip: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    precision: tl.constexpr,
    state: tl.constexpr,
    chunk_size: tl.constexpr,
    block: tl.constexpr,
):
    """One update of a chunk, and of the tensor's step counter; nothing where `skip` is not 0.

    arrived: int32 zeros, one per tensor, and zeros again at the end. state: the type of the moments, tl.float32 or
    (bfloat16) tl.uint16.
    """
    program = tl.program_id(0).to(tl.int64)
    if tl.load(skip) == 0:
        tensor = tl.load(chunks + 2 * program)
        row = table + tensor * COLUMNS
        counter = tl.load(row + STEP).to(tl.pointer_type(tl.float32))
        step = tl.load(counter) + 1
        # The tensor's last program to have read the counter writes it. Every thread reads: first wait for them all.
        tl.debug_barrier()
        if tl.atomic_add(arrived + tensor, 1) == tl.load(row + CHUNKS) - 1:
            tl.store(counter, step)
            tl.store(arrived + tensor, 0)

        numbers = groups + tl.load(row + GROUP) * NUMBERS
        first = tl.load(chunks + 2 * program + 1) * chunk_size
        count = tl.minimum(tl.load(row + NUMEL) - first, chunk_size).to(tl.int32)
        scale = tl.load(coefficient)
        if (tl.load(row + ALIGNED) != 0) & (count % 8 == 0):
            _update(
                row, numbers, first, count, scale, step, seed_low, seed_high, precision, state, True, block
            )
        else:
            _update(
                row, numbers, first, count, scale, step, seed_low, seed_high, precision, state, False, block
            )
