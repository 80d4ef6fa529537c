"""Linear cross-entropy and distillation on the device, against fp64 and torch's own error, by the rule and with the
mutants of tests/kernels/accuracy.py: every option, dtype and teacher; the vocabularies of Llama 3 and Qwen; what only a
device shows: offsets beyond 2³¹ elements, waiting for the device, the same bits twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import distillation_cases
import head_cases
from accuracy import hold
from gpu.device import Machine, moved
from gpu.record import Record
from tunesmith_kernels.linear_loss.backends import row_kernel
from tunesmith_kernels.linear_loss.cross_entropy import linear_cross_entropy
from tunesmith_kernels.linear_loss.rows import RowInputs, RowOptions, RowOutputs

ROWS, FEATURES = 250, 40
VOCABS = (303, 1024)  # rows that begin anywhere, and at multiples of 16
LARGE_VOCABS = (128_256, 151_936)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Check = tuple[str, Callable[[], None]]


def small(machine: Machine, record: Record) -> None:
    """Part parity_losses."""
    checks = (check for index, check in enumerate(_small_checks(machine)) if machine.mine(index))
    _all(record, checks, needs=2)


def large(machine: Machine, record: Record) -> None:
    """Part parity_large."""
    with record.attempt("waiting for the device"):
        _waits(machine, record)
    _all(record, _large_checks(machine), needs=5)


def _all(record: Record, checks: Iterator[Check], needs: float) -> None:
    """needs: seconds of a check."""
    done = 0
    try:
        for name, check in checks:
            with record.attempt(name, needs):
                check()
                done += 1
    finally:
        record.row("all", "cases within the rule, their mutants not", done, "cases")


def _small_checks(machine: Machine) -> Iterator[Check]:
    dtypes, vocabs = machine.pick((DTYPES, VOCABS), (DTYPES[:2], VOCABS[:1]), (DTYPES[:2], VOCABS[:1]))
    for dtype in dtypes:
        for vocab in vocabs:
            for name, case, upstream in _option_cases(vocab):
                yield (
                    f"cross-entropy, {name}, {_NAMES[dtype]}, V {vocab}",
                    _holding(machine, case, dtype, upstream),
                )
        yield from _distillation_checks(machine, dtype)


def _option_cases(vocab: int) -> Iterator[tuple[str, head_cases.Case, Tensor | None]]:
    """Cases on the CPU in fp32, by name, and the upstream gradient of rows that are not summed."""
    random = torch.Generator().manual_seed(vocab)
    class_weight, token_weight = 2 * torch.rand(vocab, generator=random), torch.rand(ROWS, generator=random)
    alone: dict[str, dict[str, Any]] = {
        "nothing": {},
        "class weights": {"class_weight": class_weight},
        "token weights": {"token_weight": token_weight},
        "smoothing": {"label_smoothing": 0.1},
        "z-loss": {"z_loss": 1e-2},
        "soft-cap": {"softcap": 2.0},
        "scale": {"scale": -1.7},
        "normalizer": {"normalizer": torch.tensor(41.5)},
    }
    together = {name: value for options in alone.values() for name, value in options.items()}
    soft = {**alone, "all": together}
    hard = {**soft, "focal": {"focal_gamma": 2.0}, "all and focal": {**together, "focal_gamma": 1.5}}
    made = head_cases.case(ROWS, FEATURES, vocab, ignored=0.2)
    for name, options in hard.items():
        yield name, made.given(**options), None
    yield (
        "rows not summed, all",
        made.given(**hard["all and focal"], reduction="none"),
        torch.randn(ROWS, generator=random),
    )
    distribution = torch.softmax(2 * torch.randn(ROWS, vocab, generator=random), 1)
    for name, options in soft.items():
        yield f"soft targets, {name}", replace(made, target=distribution).given(**options), None
    certain = head_cases.certain(ROWS, 0.99, vocab=vocab)
    yield "p of the target 0.99", replace(certain, upstream=16.0), None
    yield "upstream 0.37", replace(made, upstream=0.37), None
    yield "no bias", replace(made, bias=None), None


def _holding(
    machine: Machine, case: head_cases.Case, dtype: torch.dtype, upstream: Tensor | None = None
) -> Callable[[], None]:
    return lambda: hold_on(machine, case.to(dtype), upstream)


def hold_on(machine: Machine, case: head_cases.Case, upstream: Tensor | None = None) -> None:
    """`head_cases.hold_case` on the device."""
    case, upstream = moved(case, machine.device), moved(upstream, machine.device)
    with torch.device(machine.device):  # the references make tensors of their own
        exact = head_cases.naive(case.to(torch.float64), upstream)
        own = head_cases.naive(case, upstream)
        without = head_cases.targetless(case, exact, upstream)
    found = head_cases.fused(case, machine.loss_backend, upstream)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        dropped = {"no target": without[name].to(value.dtype)} if name in without else {}
        hold(value, exact[name], own[name], name, **dropped)


def _distillation_checks(machine: Machine, dtype: torch.dtype) -> Iterator[Check]:
    vocab = 301
    for divergence, options in distillation_cases.DIVERGENCES.items():
        for teacher in distillation_cases.TEACHERS:
            made = distillation_cases.case(
                ROWS, FEATURES, vocab, teacher=teacher, ignored=0.2, temperature=1.7, **options
            )
            yield (
                f"distillation, {divergence}, teacher's {teacher}, {_NAMES[dtype]}",
                lambda made=made: distillation_cases.hold_case(
                    moved(made.to(dtype), machine.device), machine.loss_backend
                ),
            )


def _large_checks(machine: Machine) -> Iterator[Check]:
    for dtype in DTYPES[:2]:
        for vocab in machine.pick(LARGE_VOCABS, LARGE_VOCABS[:1], (1003,)):
            case = head_cases.case(96, 64, vocab, ignored=0.3, bias=False)
            yield f"V {vocab}, {_NAMES[dtype]}", _holding(machine, case, dtype)
        # more rows than a chunk holds
        rows, vocab = machine.pick((2500, 128_256), (2500, 128_256), (300, 301))
        several = head_cases.case(rows, 64, vocab, ignored=0.1)
        yield f"several chunks, {_NAMES[dtype]}", _holding(machine, several, dtype)
        certain = head_cases.certain(128, 0.999, vocab=machine.pick(32_000, 32_000, 1003))
        yield (
            f"p of the target 0.999, {_NAMES[dtype]}",
            _holding(machine, replace(certain, upstream=16.0), dtype),
        )
    yield "all rows ignored", lambda: _all_ignored(machine)
    yield "frozen head, frozen hidden states", lambda: _frozen(machine)
    yield "statistics", lambda: _statistics(machine)
    yield "the same bits twice", lambda: _twice(machine)
    yield "a class out of range is NaN", lambda: _out_of_range(machine)
    yield "offsets beyond 2³¹ elements", lambda: _beyond(machine)


def _case(machine: Machine, dtype: torch.dtype = torch.bfloat16, **options: Any) -> head_cases.Case:
    rows, vocab = machine.pick((2500, 32_000), (2500, 32_000), (300, 301))
    return moved(head_cases.case(rows, 64, vocab, ignored=0.2).to(dtype).given(**options), machine.device)


def _all_ignored(machine: Machine) -> None:
    case = _case(machine)
    found = head_cases.fused(replace(case, target=torch.full_like(case.target, -100)), machine.loss_backend)
    assert all(not value.any() for value in found.values()), "not all zero"


def _frozen(machine: Machine) -> None:
    case = _case(machine)
    whole = head_cases.fused(case, machine.loss_backend)
    for trained in ("hidden", "weight", "bias"):
        leaves = {name: getattr(case, name).detach() for name in ("hidden", "weight", "bias")}
        leaf = leaves[trained].requires_grad_()
        loss = linear_cross_entropy(
            leaves["hidden"],
            leaves["weight"],
            case.target,
            bias=leaves["bias"],
            backend=machine.loss_backend,
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert torch.equal(gradient, whole[trained]), f"{trained} alone has another gradient"


def _statistics(machine: Machine) -> None:
    case = _case(machine, torch.float32)
    _, stats = linear_cross_entropy(
        case.hidden, case.weight, case.target, bias=case.bias, backend=machine.loss_backend, return_stats=True
    )
    logits = torch.nn.functional.linear(case.hidden, case.weight, case.bias)
    kept = case.target != -100
    at = case.target.where(kept, 0)[:, None]

    def of(z: Tensor) -> dict[str, Tensor]:
        log_s = torch.log_softmax(z, 1)
        return {
            "log_prob": log_s.gather(1, at)[:, 0].where(kept, 0),
            "entropy": -(log_s.exp() * log_s).sum(1).where(kept, 0),
            "lse": torch.logsumexp(z, 1).where(kept, 0),
        }

    exact, own = of(logits.double()), of(logits)
    for name, value in exact.items():
        hold(getattr(stats, name), value, own[name], name)
    correct = (logits.gather(1, at)[:, 0] >= logits.amax(1)) & kept
    assert torch.equal(stats.correct, correct)
    assert torch.equal(stats.counted, kept)


def _twice(machine: Machine) -> None:
    case = _case(machine)
    first, second = (head_cases.fused(case, machine.loss_backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def _out_of_range(machine: Machine) -> None:
    if machine.device.type == "cpu":
        return  # where it raises
    case = _case(machine)
    target = case.target.clone()
    target[0] = case.weight.shape[0]
    loss = linear_cross_entropy(case.hidden, case.weight, target, backend=machine.loss_backend)
    assert bool(loss.isnan()), f"the loss is {loss.item()}"


def _beyond(machine: Machine) -> None:
    """The row kernel on a buffer of more than 2³¹ logits: its last rows against fp64."""
    vocab = machine.pick(128_256, 128_256, 301)
    rows = machine.pick((1 << 31) // 128_256 + 300, (1 << 31) // 128_256 + 300, 330)
    logits = torch.randn(rows, vocab, device=machine.device, dtype=torch.bfloat16)
    target = torch.randint(vocab, (rows,), device=machine.device)
    factor = torch.full((rows,), 0.5, device=machine.device)
    loss, log_prob, entropy, lse = torch.full((4, rows), torch.nan, device=machine.device)
    correct = torch.zeros(rows, dtype=torch.bool, device=machine.device)
    outputs = RowOutputs(loss, log_prob, entropy, lse, correct)
    last = slice(rows - 64, rows)
    leaf = logits[last].double().requires_grad_()
    rough = logits[last].clone().requires_grad_()
    losses: list[Tensor] = []
    for tensor in (leaf, rough):
        z = tensor if tensor is leaf else tensor.float()
        losses.append(torch.nn.functional.cross_entropy(z, target[last], reduction="none"))
        (losses[-1].sum() * 0.5).backward()
    row_kernel(machine.loss_backend)(logits, RowInputs(target, None, None, factor), RowOptions(), outputs)
    assert leaf.grad is not None
    assert rough.grad is not None
    hold(logits[last], leaf.grad, rough.grad, "the last rows' gradient")
    hold(outputs.loss[last], losses[0].detach(), losses[1].detach(), "the last rows' loss")
    assert bool(outputs.loss.isfinite().all()), "a row has no loss"


def _waits(machine: Machine, record: Record) -> None:
    """How often one forward and backward wait for the device: once, for the number of labelled rows."""
    if machine.device.type == "cpu":
        return
    case = _case(machine)
    head_cases.fused(case, machine.loss_backend)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            head_cases.fused(case, machine.loss_backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    count = sum("synchroniz" in str(warning.message) for warning in caught)
    record.row("cross-entropy, forward and backward", "waits for the device", count, "times", "<= 1")
