"""The Triton kernel of 8-bit AdamW: the update of many tensors.

As in `adamw.triton_kernels`: a table with one row of int64 per tensor, one with a row of fp32 per group, and a table of
chunks, a pair of int64 (row, index of the chunk within the tensor) per program. All arithmetic on elements is fp32.
"""

# triton's annotations do not know that a constexpr holds a type or a number
# pyright: reportArgumentType=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from tunesmith_kernels.adamw.triton_kernels import bias_correction
from tunesmith_kernels.triton_numbers import (
    random_pair,
    rounded_nearest,
    rounded_stochastic,
    stream_key,
    widened,
)

# columns of the tensors' table: addresses first, then numbers
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
STATE1 = tl.constexpr(2)
STATE2 = tl.constexpr(3)
ABSMAX1 = tl.constexpr(4)
ABSMAX2 = tl.constexpr(5)
STEP = tl.constexpr(6)
NUMEL = tl.constexpr(7)
ALIGNED = tl.constexpr(8)
CHUNKS = tl.constexpr(9)
STREAM = tl.constexpr(10)
OFFSET = tl.constexpr(11)
GROUP = tl.constexpr(12)
COLUMNS = tl.constexpr(13)

# columns of the groups' table, fp32
LR = tl.constexpr(0)
DECAY = tl.constexpr(1)  # 1 − lr · weight decay
BETA1 = tl.constexpr(2)
WEIGHT1 = tl.constexpr(3)  # 1 − β1
BETA2 = tl.constexpr(4)
WEIGHT2 = tl.constexpr(5)
EPS = tl.constexpr(6)
LOG1_HIGH = tl.constexpr(7)  # ln β1 as the sum of two numbers
LOG1_LOW = tl.constexpr(8)
LOG2_HIGH = tl.constexpr(9)
LOG2_LOW = tl.constexpr(10)
NUMBERS = tl.constexpr(11)


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
def _decoded(
    codes: tl.tensor,
    absmax: tl.tensor,
    values: tl.tensor,
    index: tl.tensor,
    within: tl.tensor,
    block_size: tl.constexpr,
):
    """The numbers of the elements `index`, fp32; 0 where not `within`. codes, absmax, values: pointers, to the tensor's
    uint8 and fp32, and to the code book's values."""
    code = tl.load(codes + index, mask=within, other=0)
    scale = tl.load(absmax + index // block_size, mask=within, other=0.0)
    return tl.where(within, tl.load(values + code.to(tl.int32)) * scale, 0.0)


@triton.jit
def _encoded(
    numbers: tl.tensor,
    bounds: tl.tensor,
    signed: tl.constexpr,
    blocks: tl.constexpr,
    block_size: tl.constexpr,
):
    """The nearest codes of whole blocks, uint8 of numbers' shape, and the blocks' largest magnitudes (blocks,).

    numbers: fp32 (blocks × block_size,), 0 beyond a tensor's end; bounds: pointer to the code book's.

    The dynamic map has, in the decade that ends at 10^(d − 6), 2^d equal parts (unsigned: twice as many), so a code is
    found by arithmetic, and is right or, by rounding and near the ends of decades, off by one. Its bounds decide.
    """
    absmax = tl.max(tl.reshape(tl.abs(numbers), (blocks, block_size)), axis=1)
    divisors = tl.where(absmax == 0, 1.0, absmax)
    scaled = tl.div_rn(
        numbers, tl.reshape(tl.broadcast_to(divisors[:, None], (blocks, block_size)), (blocks * block_size,))
    )
    magnitude = tl.abs(scaled)
    slope = tl.zeros_like(magnitude)
    intercept = tl.zeros_like(magnitude)
    for decade in tl.static_range(7):
        parts = 2.0**decade if signed else 2.0 ** (decade + 1)
        codes_below = parts if signed else parts - 1
        reached = magnitude > 10.0 ** (decade - 7)
        slope = tl.where(reached, parts / (0.9 * 10.0 ** (decade - 6)), slope)
        intercept = tl.where(reached, codes_below - parts / 9, intercept)
    distance = (magnitude * slope + intercept).to(tl.int32)
    if signed:
        distance = tl.where(scaled < 0, 127 - distance, 127 + distance)
    guess = tl.minimum(tl.maximum(distance, 0), 255)
    above = (scaled > tl.load(bounds + guess + 1)).to(tl.int32)
    below = (scaled <= tl.load(bounds + guess)).to(tl.int32)
    return (guess + above - below).to(tl.uint8), absmax


@triton.jit
def _update(
    row: tl.tensor,
    numbers: tl.tensor,
    values1: tl.tensor,
    bounds1: tl.tensor,
    values2: tl.tensor,
    bounds2: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    coefficient: tl.tensor,
    step: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    rounding: tl.constexpr,
    encoded: tl.constexpr,
    aligned: tl.constexpr,
    blocks: tl.constexpr,
    block_size: tl.constexpr,
):
    """The update of the elements first .. first + count − 1 of one tensor, in turns of `blocks` blocks; `step` is its
    number, from 1. aligned: the addresses are multiples of 16 bytes and the count of 16."""
    plain: tl.constexpr = tl.float32 if rounding == "none" else tl.uint16
    state: tl.constexpr = tl.uint8 if encoded else tl.float32
    # a thread reads as many elements of the narrower types as it does of fp32: else layouts are converted in between
    align_plain: tl.constexpr = 1 if not aligned else (16 if rounding == "none" else 8)
    align_state: tl.constexpr = 1 if not aligned else (4 if encoded else 16)
    param = _pointer(row, PARAM, first, plain, align_plain)
    grad = _pointer(row, GRAD, first, plain, align_plain)
    state1 = _pointer(row, STATE1, first, state, align_state)
    state2 = _pointer(row, STATE2, first, state, align_state)
    if encoded:
        absmax1 = _pointer(row, ABSMAX1, first // block_size, tl.float32, 4)
        absmax2 = _pointer(row, ABSMAX2, first // block_size, tl.float32, 4)

    correction1 = bias_correction(step, tl.load(numbers + LOG1_HIGH), tl.load(numbers + LOG1_LOW))
    root2 = tl.sqrt_rn(bias_correction(step, tl.load(numbers + LOG2_HIGH), tl.load(numbers + LOG2_LOW)))
    step_size = tl.div_rn(tl.load(numbers + LR), correction1)
    if rounding == "stochastic":
        key = stream_key(seed_low, seed_high, step.to(tl.int32), tl.load(row + STREAM))
        origin = tl.load(row + OFFSET) + first

    turn: tl.constexpr = blocks * block_size
    # a value that the compiler knows to be a multiple of 16: then a mask is shared by what is read at once
    end = count // 16 * 16 if aligned else count
    for start in range(0, count, turn):
        index = start + tl.arange(0, turn)
        within = index < end
        g = _read(grad, index, within) * coefficient
        if encoded:
            m = _decoded(state1, absmax1, values1, index, within, block_size)
            v = _decoded(state2, absmax2, values2, index, within, block_size)
        else:
            m = _read(state1, index, within)
            v = _read(state2, index, within)
        m = m * tl.load(numbers + BETA1) + g * tl.load(numbers + WEIGHT1)
        v = v * tl.load(numbers + BETA2) + (g * tl.load(numbers + WEIGHT2)) * g
        p = _read(param, index, within) * tl.load(numbers + DECAY)
        p -= tl.div_rn(m * step_size, tl.div_rn(tl.sqrt_rn(v), root2) + tl.load(numbers + EPS))

        if rounding == "none":
            tl.store(param + index, p, mask=within)
        elif rounding == "nearest":
            tl.store(param + index, rounded_nearest(p), mask=within)
        else:
            one, _ = random_pair(key, origin + start, turn)
            tl.store(param + index, rounded_stochastic(p, one & 0xFFFF), mask=within)
        if encoded:
            block = start // block_size + tl.arange(0, blocks)
            begun = block * block_size < count
            codes, largest = _encoded(m, bounds1, True, blocks, block_size)
            tl.store(state1 + index, codes, mask=within)
            tl.store(absmax1 + block, largest, mask=begun)
            codes, largest = _encoded(v, bounds2, False, blocks, block_size)
            tl.store(state2 + index, codes, mask=within)
            tl.store(absmax2 + block, largest, mask=begun)
        else:
            tl.store(state1 + index, m, mask=within)
            tl.store(state2 + index, v, mask=within)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def update_chunks(
    table: tl.tensor,
    groups: tl.tensor,
    chunks: tl.tensor,
    arrived: tl.tensor,
    values1: tl.tensor,
    bounds1: tl.tensor,
    values2: tl.tensor,
    bounds2: tl.tensor,
    coefficient: tl.tensor,
    skip: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    rounding: tl.constexpr,
    encoded: tl.constexpr,
    chunk_size: tl.constexpr,
    blocks: tl.constexpr,
    block_size: tl.constexpr,
):
    """One update of a chunk, and of the tensor's step counter; nothing where `skip` is not 0.

    arrived: int32 zeros, one per tensor, and zeros again at the end. values1, bounds1, values2, bounds2: the code
    books of the first and the second moments. rounding: of the parameters, "none" for fp32, "nearest" or "stochastic"
    for bfloat16. encoded: whether the moments are 8-bit codes or fp32. chunk_size: a multiple of block_size.
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
        if (tl.load(row + ALIGNED) != 0) & (count % 16 == 0):
            _update(
                row, numbers, values1, bounds1, values2, bounds2, first, count, scale, step, seed_low, seed_high,
                rounding, encoded, True, blocks, block_size,
            )  # fmt: skip
        else:
            _update(
                row, numbers, values1, bounds1, values2, bounds2, first, count, scale, step, seed_low, seed_high,
                rounding, encoded, False, blocks, block_size,
            )  # fmt: skip
