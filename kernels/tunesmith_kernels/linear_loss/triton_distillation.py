"""The row kernels of the linear distillation in Triton: `distillation_rows` has the formula,
`native/distillation_rows.cpp` the C++ form.

A program computes one row of the student's logits and one of the teacher's, and goes over them three times: for the
maxima, for the sums, and to write the gradient over the student's; for JSD once more, since its sums need those of the
softmaxes. Sums are kept in lanes, joined at the end of a pass. A teacher known by k classes is gathered first; the
student's logits of these classes are then marked in the buffer, so that the sums over the others leave them out.

Importing this module needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith_kernels import triton_support
from tunesmith_kernels.linear_loss.distillation_rows import (
    TAIL_FLOOR,
    DistillationInputs,
    DistillationOptions,
    DistillationOutputs,
)
from tunesmith_kernels.linear_loss.triton_logits import load_logits, shaped, store_logits

FORWARD_KL, REVERSE_KL, JSD = 0, 1, 2
_KINDS = {"forward_kl": FORWARD_KL, "reverse_kl": REVERSE_KL, "jsd": JSD}
_FORWARD, _REVERSE, _JSD = tl.constexpr(FORWARD_KL), tl.constexpr(REVERSE_KL), tl.constexpr(JSD)
# what a logit of −inf counts as, so that it multiplies with 0; a divergence beyond _INFINITE came from it
_FLOOR, _INFINITE = tl.constexpr(-1e30), tl.constexpr(1e25)
_LEAST_TAIL = tl.constexpr(1.6e-38)
MOST_CLASSES = 4096  # of a top-k teacher: a program holds them all at once


def block_size(vocab: int) -> tuple[int, int]:
    """Logits of a row that are loaded at once, and the warps that share them."""
    block = min(_power_of_2(vocab), 1024)
    return block, max(1, block // 128)  # more logits in a thread would spill its registers


def triton_distillation_rows(
    logits: Tensor, inputs: DistillationInputs, options: DistillationOptions, outputs: DistillationOutputs
) -> None:
    """See `DistillationKernel`; logits on a CUDA device, or on the CPU under triton's interpreter. A target or an index
    that is no class has a loss of NaN, and a gradient of NaN. Raises ValueError for a teacher of more than 4096 known
    classes."""
    assert logits.is_contiguous()
    count, vocab = logits.shape
    if count == 0:
        return
    block, warps = block_size(vocab)
    common = (
        *(inputs.target, inputs.token_weight, inputs.gradient_factor),
        *(outputs.loss, outputs.kd, outputs.log_prob, outputs.entropy, outputs.agree.view(torch.uint8)),
        *(vocab, options.beta, options.temperature, options.kd_weight, options.ce_weight),
        *(options.softcap, options.scale),
    )
    flags = {
        "kind": _KINDS[options.divergence],
        "warm": options.temperature != 1,
        "capped": options.softcap != 0,
        "scaled": options.scale != 1,
        "block": block,
        "interpreted": triton_support.interpreting(),
        "num_warps": warps,
    }
    if inputs.teacher_logits is not None:
        triton_support.launch(
            dense_kernel,
            count,
            logits.device,
            *(_bits(logits), _bits(inputs.teacher_logits), *common),
            *(options.teacher_softcap, options.teacher_scale),
            teacher_capped=options.teacher_softcap != 0,
            teacher_scaled=options.teacher_scale != 1,
            **flags,
        )
        return
    assert inputs.indices is not None
    k = inputs.indices.shape[1]
    if k > MOST_CLASSES:
        raise ValueError(
            f"linear loss: backend triton takes a teacher of {MOST_CLASSES} classes at most, not {k}"
        )
    triton_support.launch(
        top_k_kernel,
        count,
        logits.device,
        *(_bits(logits), inputs.indices, inputs.log_probs, *common),
        *(k, TAIL_FLOOR),
        tail=options.tail and k < vocab,
        whole=not options.tail,
        few=_power_of_2(k),
        **flags,
    )


def _power_of_2(number: int) -> int:
    """The next one, number itself included."""
    return 1 << (number - 1).bit_length()


def _bits(logits: Tensor) -> Tensor:
    return logits.view(torch.int16) if logits.dtype == torch.bfloat16 else logits


@triton.jit
def _expm1(x: tl.tensor):
    """e^x − 1 for x ≤ 0: near 0 by its series."""
    p = x * (1.0 / 40320) + 1.0 / 5040
    p = p * x + 1.0 / 720
    p = p * x + 1.0 / 120
    p = p * x + 1.0 / 24
    p = p * x + 1.0 / 6
    p = p * x + 0.5
    return tl.where(x > -0.5, x + x * x * p, tl.exp(x) - 1.0)


@triton.jit
def _log1p(w: tl.tensor):
    """log(1 + w) for −1 < w ≤ 0, with what the sum 1 + w loses."""
    s = 1.0 + w
    return tl.log(s) + (w - (s - 1.0)) / s


@triton.jit
def _log1p_positive(x: tl.tensor):
    s = 1.0 + x
    return tl.log(s) + (x - (s - 1.0)) / s


@triton.jit
def _against_mixture(d: tl.tensor, beta: tl.tensor):
    """log(p/m) and log(q/m), m = βp + (1−β)q, from d = log p − log q."""
    up = d >= 0
    nearer = -_log1p(tl.where(up, 1.0 - beta, beta) * _expm1(-tl.abs(d)))
    return tl.where(up, nearer, nearer + d), tl.where(up, nearer - d, nearer)


@triton.jit
def _logit(x: tl.tensor, scale: tl.tensor, softcap: tl.tensor, capped: tl.constexpr, scaled: tl.constexpr):
    """z, without its slope."""
    z, _slope = shaped(x, scale, softcap, capped, scaled)  # pyright: ignore[reportGeneralTypeIssues]
    return z


@triton.jit
def _label(target: tl.tensor | None, row: tl.tensor, vocab: tl.tensor):
    """The row's class (−1 without targets), and whether it is one."""
    label = tl.full([], -1, tl.int64)
    valid = True
    if target is not None:
        label = tl.load(target + row)
        valid = (label >= 0) & (label < vocab)
    return label, valid


@triton.jit
def _finish(
    divergence: tl.tensor,
    log_prob: tl.tensor,
    entropy: tl.tensor,
    agree: tl.tensor,
    row: tl.tensor,
    token_weight: tl.tensor | None,
    loss_out: tl.tensor,
    kd_out: tl.tensor,
    log_prob_out: tl.tensor,
    entropy_out: tl.tensor,
    agree_out: tl.tensor,
    temperature: tl.tensor,
    kd_weight: tl.tensor,
    ce_weight: tl.tensor,
):
    """Writes what belongs to the row."""
    divergence = tl.where(divergence > _INFINITE, float("inf"), divergence)
    kd = temperature * temperature * divergence
    loss = tl.where(kd_weight == 0, 0.0, kd_weight * kd) - tl.where(ce_weight == 0, 0.0, ce_weight * log_prob)
    if token_weight is not None:
        loss *= tl.load(token_weight + row)
    tl.store(loss_out + row, loss)
    tl.store(kd_out + row, kd)
    tl.store(log_prob_out + row, log_prob)
    tl.store(entropy_out + row, entropy)
    tl.store(agree_out + row, agree.to(tl.uint8))


@triton.jit
def dense_kernel(
    logits: tl.tensor,
    teacher: tl.tensor,
    target: tl.tensor | None,
    token_weight: tl.tensor | None,
    factor: tl.tensor | None,
    loss_out: tl.tensor,
    kd_out: tl.tensor,
    log_prob_out: tl.tensor,
    entropy_out: tl.tensor,
    agree_out: tl.tensor,
    vocab: tl.tensor,
    beta: tl.tensor,
    temperature: tl.tensor,
    kd_weight: tl.tensor,
    ce_weight: tl.tensor,
    softcap: tl.tensor,
    scale: tl.tensor,
    teacher_softcap: tl.tensor,
    teacher_scale: tl.tensor,
    kind: tl.constexpr,
    warm: tl.constexpr,
    capped: tl.constexpr,
    scaled: tl.constexpr,
    teacher_capped: tl.constexpr,
    teacher_scaled: tl.constexpr,
    block: tl.constexpr,
    interpreted: tl.constexpr,
):
    """logits and teacher: *fp32, *fp16, or *i16 for bfloat16, [rows, vocab]; target *i64, token_weight and factor *fp32
    [rows], or None; the outputs: [rows], *fp32, and agree_out *u8."""
    row = tl.program_id(0).to(tl.int64)
    student, other = logits + row * vocab, teacher + row * vocab
    lane = tl.arange(0, block)
    label, valid = _label(target, row, vocab)  # pyright: ignore[reportGeneralTypeIssues]
    z_target = 0.0
    if target is not None:
        own_logit = load_logits(student + tl.where(valid, label, 0), True)
        z_target = _logit(own_logit, scale, softcap, capped, scaled)
        z_target = tl.where(valid, z_target, float("nan"))

    # the maxima, and the teacher's logit where the student's is greatest
    high = tl.full([block], float("-inf"), tl.float32)
    other_high = tl.full([block], float("-inf"), tl.float32)
    beside = tl.full([block], float("-inf"), tl.float32)
    broken = tl.zeros([block], tl.int32)
    for start in range(0, vocab, block):
        inside = start + lane < vocab
        z = _logit(load_logits(student + start + lane, inside), scale, softcap, capped, scaled)
        t = _logit(
            load_logits(other + start + lane, inside),
            teacher_scale,
            teacher_softcap,
            teacher_capped,
            teacher_scaled,
        )
        broken |= (inside & ((z != z) | (t != t))).to(tl.int32)
        z, t = tl.where(inside, z, float("-inf")), tl.where(inside, t, float("-inf"))
        beside = tl.where(z > high, t, tl.where(z == high, tl.maximum(beside, t), beside))
        high, other_high = tl.maximum(high, z), tl.maximum(other_high, t)
    top, other_top = tl.max(high, axis=0), tl.max(other_high, axis=0)
    sound = (tl.max(broken, axis=0) == 0) & (tl.abs(top) < float("inf")) & (tl.abs(other_top) < float("inf"))
    top = tl.where(sound, top, float("nan"))
    # d = a − b is counted from the class that has most of q: there log q − log p − D, of reverse KL's gradient, cancels
    origin = 0.0
    if kind == _REVERSE:
        beside = tl.max(tl.where(high == top, beside, float("-inf")), axis=0)
        origin = tl.maximum(beside - other_top, _FLOOR) / temperature

    total = tl.zeros([block], tl.float32)
    weighted = tl.zeros([block], tl.float32)
    of_q = tl.zeros([block], tl.float32)
    of_p = tl.zeros([block], tl.float32)
    cross = tl.zeros([block], tl.float32)
    both = tl.zeros([block], tl.int32)
    for start in range(0, vocab, block):
        cols = start + lane
        inside = cols < vocab
        z = _logit(load_logits(student + cols, inside), scale, softcap, capped, scaled)
        t = _logit(
            load_logits(other + cols, inside), teacher_scale, teacher_softcap, teacher_capped, teacher_scaled
        )
        x = tl.where(inside, tl.maximum(z - top, _FLOOR), _FLOOR)
        y = tl.where(inside, tl.maximum(t - other_top, _FLOOR), _FLOOR)
        both |= ((x == 0) & (y == 0)).to(tl.int32)
        e = tl.exp(x)
        eb, b, a = e, x, y
        if warm:
            b, a = x / temperature, y / temperature
            eb = tl.exp(b)
        ea = tl.exp(a)
        rest = tl.where(cols == label, 0.0, e)
        total += rest
        weighted += rest * x
        of_q += eb
        of_p += ea
        if kind == _FORWARD:
            cross += ea * (a - b)
        elif kind == _REVERSE:
            cross += eb * (a - b - origin)
    others, sum_q, sum_p = tl.sum(total, axis=0), tl.sum(of_q, axis=0), tl.sum(of_p, axis=0)
    sum_weighted, sum_cross = tl.sum(weighted, axis=0), tl.sum(cross, axis=0)
    log_prob, own, sum_plain = 0.0, 0.0, others
    if target is not None:
        below = tl.maximum(z_target - top, _FLOOR)
        own = tl.exp(below)
        sum_plain = others + own
        sum_weighted += own * below
        log_total = tl.where(below == 0, _log1p_positive(others), tl.log(sum_plain))
        log_prob = tl.where(z_target == float("-inf"), z_target, below) - log_total
        log_prob = tl.where(z_target == z_target, log_prob, float("nan"))
    entropy = tl.log(sum_plain) - sum_weighted / sum_plain
    shift = tl.log(sum_p) - tl.log(sum_q)  # log p − log q = a − b − shift
    centre = 0.0
    if kind == _FORWARD:
        divergence = sum_cross / sum_p - shift
    elif kind == _REVERSE:
        centre = sum_cross / sum_q
        divergence = shift - origin - centre
    else:
        from_p = tl.zeros([block], tl.float32)
        from_q = tl.zeros([block], tl.float32)
        for start in range(0, vocab, block):
            cols = start + lane
            inside = cols < vocab
            z = _logit(load_logits(student + cols, inside), scale, softcap, capped, scaled)
            t = _logit(
                load_logits(other + cols, inside),
                teacher_scale,
                teacher_softcap,
                teacher_capped,
                teacher_scaled,
            )
            b = tl.where(inside, tl.maximum(z - top, _FLOOR), _FLOOR) / temperature
            a = tl.where(inside, tl.maximum(t - other_top, _FLOOR), _FLOOR) / temperature
            log_p, log_q = _against_mixture(a - b - shift, beta)
            from_p += tl.exp(a) * log_p
            from_q += tl.exp(b) * log_q
        centre = tl.sum(from_q, axis=0) / sum_q
        divergence = beta * (tl.sum(from_p, axis=0) / sum_p) + (1.0 - beta) * centre
    agree = tl.max(both, axis=0)
    divergence = tl.where(sound, divergence, float("nan"))
    if target is not None:
        divergence = tl.where(valid, divergence, float("nan"))
    _finish(
        divergence,
        log_prob,
        tl.where(sound, entropy, float("nan")),
        agree,
        row,
        token_weight,
        loss_out,
        kd_out,
        log_prob_out,
        entropy_out,
        agree_out,
        temperature,
        kd_weight,
        ce_weight,
    )
    if factor is not None:
        outer = tl.load(factor + row) * scale
        if target is not None:
            outer = tl.where(valid, outer, float("nan"))
        kd = outer * kd_weight * temperature  # T² of the loss, 1/T of the logits
        per_q, per_p, per_e = kd / sum_q, kd / sum_p, outer * ce_weight / sum_plain
        missed = outer * ce_weight * (others / sum_plain)
        tl.debug_barrier()  # the target's logit was read by every thread: from here on it is written to
        for start in range(0, vocab, block):
            cols = start + lane
            inside = cols < vocab
            z, slope = shaped(load_logits(student + cols, inside), scale, softcap, capped, scaled)
            t = _logit(
                load_logits(other + cols, inside),
                teacher_scale,
                teacher_softcap,
                teacher_capped,
                teacher_scaled,
            )
            x, y = tl.maximum(z - top, _FLOOR), tl.maximum(t - other_top, _FLOOR)
            e = tl.exp(x)
            eb, b, a = e, x, y
            if warm:
                b, a = x / temperature, y / temperature
                eb = tl.exp(b)
            if kind == _FORWARD:
                gradient = per_q * eb - per_p * tl.exp(a)
            elif kind == _REVERSE:
                gradient = per_q * eb * (centre - (a - b - origin))
            else:
                log_p, log_q = _against_mixture(a - b - shift, beta)
                gradient = (1.0 - beta) * per_q * eb * (log_q - centre)
            # s − 1 without cancellation where the row is nearly certain
            gradient += tl.where(cols == label, -missed, per_e * e)
            gradient = tl.where(sound, gradient * slope, float("nan"))
            store_logits(student + cols, gradient, inside, interpreted)


@triton.jit
def top_k_kernel(
    logits: tl.tensor,
    indices: tl.tensor,
    log_probs: tl.tensor,
    target: tl.tensor | None,
    token_weight: tl.tensor | None,
    factor: tl.tensor | None,
    loss_out: tl.tensor,
    kd_out: tl.tensor,
    log_prob_out: tl.tensor,
    entropy_out: tl.tensor,
    agree_out: tl.tensor,
    vocab: tl.tensor,
    beta: tl.tensor,
    temperature: tl.tensor,
    kd_weight: tl.tensor,
    ce_weight: tl.tensor,
    softcap: tl.tensor,
    scale: tl.tensor,
    k: tl.tensor,
    tail_floor: tl.tensor,
    tail: tl.constexpr,
    whole: tl.constexpr,
    few: tl.constexpr,
    kind: tl.constexpr,
    warm: tl.constexpr,
    capped: tl.constexpr,
    scaled: tl.constexpr,
    block: tl.constexpr,
    interpreted: tl.constexpr,
):
    """As `dense_kernel`, with indices *i64 and log_probs *fp32 [rows, k]. tail: there is a bucket of all other classes;
    whole: both are normalised over the k classes alone; few: k, to the next power of 2."""
    row = tl.program_id(0).to(tl.int64)
    student = logits + row * vocab
    lane, of_k = tl.arange(0, block), tl.arange(0, few)
    known = of_k < k
    label, valid = _label(target, row, vocab)  # pyright: ignore[reportGeneralTypeIssues]
    z_target = 0.0
    if target is not None:
        own_logit = load_logits(student + tl.where(valid, label, 0), True)
        z_target = _logit(own_logit, scale, softcap, capped, scaled)
        z_target = tl.where(valid, z_target, float("nan"))
    index = tl.load(indices + row * k + of_k, mask=known, other=0)
    fits = (index >= 0) & (index < vocab)
    known_fits = known & fits
    log_p = tl.load(log_probs + row * k + of_k, mask=known, other=float("-inf"))
    place = student + tl.where(fits, index, 0)
    z_k, slope_k = shaped(load_logits(place, known_fits), scale, softcap, capped, scaled)
    z_k = tl.where(known_fits, z_k, float("-inf"))

    high = tl.full([block], float("-inf"), tl.float32)
    broken = tl.zeros([block], tl.int32)
    for start in range(0, vocab, block):
        inside = start + lane < vocab
        z = _logit(load_logits(student + start + lane, inside), scale, softcap, capped, scaled)
        broken |= (inside & (z != z)).to(tl.int32)
        high = tl.maximum(high, tl.where(inside, z, float("-inf")))
    top = tl.max(high, axis=0)
    sound = (tl.max(broken, axis=0) == 0) & (tl.abs(top) < float("inf"))
    sound = sound & (tl.max((known & ((log_p != log_p) | (fits == 0))).to(tl.int32), axis=0) == 0) & valid
    top = tl.where(sound, top, float("nan"))
    likeliest = tl.max(log_p, axis=0)
    agree = tl.max((known_fits & (log_p == likeliest) & (z_k == top)).to(tl.int32), axis=0)

    # the k classes are marked with +inf, which a sound row has not, so that the passes over all classes leave them out
    tl.debug_barrier()
    store_logits(place, tl.full([few], float("inf"), tl.float32), known_fits, interpreted)
    tl.debug_barrier()
    total = tl.zeros([block], tl.float32)
    weighted = tl.zeros([block], tl.float32)
    of_q = tl.zeros([block], tl.float32)
    for start in range(0, vocab, block):
        cols = start + lane
        raw = load_logits(student + cols, cols < vocab)
        inside = (cols < vocab) & (raw != float("inf"))
        z = _logit(raw, scale, softcap, capped, scaled)
        x = tl.where(inside, tl.maximum(z - top, _FLOOR), _FLOOR)
        e = tl.exp(x)
        rest = tl.where(cols == label, 0.0, e)
        total += rest
        weighted += rest * x
        if warm:
            of_q += tl.exp(x / temperature)
        else:
            of_q += e
    x_k = tl.where(known_fits, tl.maximum(z_k - top, _FLOOR), _FLOOR)
    e_k = tl.exp(x_k)
    rest_k = tl.where(index == label, 0.0, e_k)
    others = tl.sum(total, axis=0) + tl.sum(rest_k, axis=0)
    sum_weighted = tl.sum(weighted, axis=0) + tl.sum(rest_k * x_k, axis=0)
    log_prob, sum_plain = 0.0, others
    if target is not None:
        below = tl.maximum(z_target - top, _FLOOR)
        own = tl.exp(below)
        sum_plain = others + own
        sum_weighted += own * below
        log_total = tl.where(below == 0, _log1p_positive(others), tl.log(sum_plain))
        log_prob = tl.where(z_target == float("-inf"), z_target, below) - log_total
    entropy = tl.log(sum_plain) - sum_weighted / sum_plain

    b_k = x_k / temperature
    outside = tl.maximum(tl.sum(of_q, axis=0), _LEAST_TAIL)
    most = tl.max(b_k, axis=0)
    if tail:
        most = tl.zeros([], tl.float32)
    sum_q = tl.sum(tl.where(known, tl.exp(b_k - most), 0.0), axis=0)
    if tail:
        sum_q += outside
    log_q = b_k - most - tl.log(sum_q)
    if whole:
        greatest = tl.max(log_p, axis=0)
        log_p = log_p - greatest - tl.log(tl.sum(tl.where(known, tl.exp(log_p - greatest), 0.0), axis=0))
    p, q = tl.where(known, tl.exp(log_p), 0.0), tl.where(known, tl.exp(log_q), 0.0)
    mass, tail_p, tail_q, tail_log_p, tail_log_q = tl.sum(p, axis=0), 0.0, 0.0, 0.0, 0.0
    if tail:
        tail_p = tl.maximum(1.0 - mass, tail_floor)
        tail_q = outside / sum_q
        tail_log_p, tail_log_q = tl.log(tail_p), tl.log(outside) - tl.log(sum_q)
        mass += tail_p
    d = tl.where(known & (log_p != log_q), log_p - log_q, 0.0)
    tail_d = tail_log_p - tail_log_q
    if kind == _FORWARD:
        divergence = tl.sum(tl.where(p == 0, 0.0, p * d), axis=0) + tail_p * tail_d
        gradient_k, tail_gradient = q * mass - p, tail_q * mass - tail_p
    elif kind == _REVERSE:
        divergence = -tl.sum(tl.where(q == 0, 0.0, q * d), axis=0) - tail_q * tail_d
        gradient_k, tail_gradient = (
            tl.where(q == 0, 0.0, -q * (d + divergence)),
            -tail_q * (tail_d + divergence),
        )
    else:
        to_p, to_q = _against_mixture(d, beta)
        tail_to_p, tail_to_q = _against_mixture(tail_d, beta)
        from_q = tl.sum(tl.where(q == 0, 0.0, q * to_q), axis=0) + tail_q * tail_to_q
        from_p = tl.sum(tl.where(p == 0, 0.0, p * to_p), axis=0) + tail_p * tail_to_p
        divergence = beta * from_p + (1.0 - beta) * from_q
        gradient_k = tl.where(q == 0, 0.0, (1.0 - beta) * q * (to_q - from_q))
        tail_gradient = (1.0 - beta) * tail_q * (tail_to_q - from_q)
    _finish(
        tl.where(sound, divergence, float("nan")),
        tl.where(sound, log_prob, float("nan")),
        tl.where(sound, entropy, float("nan")),
        agree,
        row,
        token_weight,
        loss_out,
        kd_out,
        log_prob_out,
        entropy_out,
        agree_out,
        temperature,
        kd_weight,
        ce_weight,
    )
    if factor is not None:
        outer = tl.where(sound, tl.load(factor + row) * scale, float("nan"))
        kd = outer * kd_weight * temperature
        by_tail = 0.0 * outer
        if tail:
            by_tail = kd * tail_gradient / outside
        per_e = outer * ce_weight / sum_plain
        missed = outer * ce_weight * (others / sum_plain)
        for start in range(0, vocab, block):
            cols = start + lane
            inside = cols < vocab
            z, slope = shaped(load_logits(student + cols, inside), scale, softcap, capped, scaled)
            x = tl.maximum(z - top, _FLOOR)
            e = tl.exp(x)
            eb = e
            if warm:
                eb = tl.exp(x / temperature)
            gradient = by_tail * eb + tl.where(cols == label, -missed, per_e * e)
            store_logits(student + cols, gradient * slope, inside, interpreted)
        tl.debug_barrier()  # over what the pass left in the k classes' places
        gradient_k = kd * gradient_k + tl.where(index == label, -missed, per_e * e_k)
        store_logits(place, gradient_k * slope_k, known_fits, interpreted)
