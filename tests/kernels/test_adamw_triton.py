"""AdamW's Triton kernels in triton's interpreter against fp64, and against torch's own error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accuracy import hold
from adamw_triton_runs import (
    BETAS,
    BF16,
    CASES,
    DRAWS,
    FIRSTS,
    FP32,
    KINDS,
    MAX_NORM,
    SEED,
    STEPS,
    Case,
    Entry,
    Settings,
    build,
    lr_at,
    norm_cases,
    rounding_inputs,
)

RUNS = Path(__file__).with_name("adamw_triton_runs.py")
STATES = ("params", "exp_avgs", "exp_avg_sqs", "extras", "steps")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernels computed, all cases in one process of its own."""
    out = tmp_path_factory.mktemp("adamw") / "found.pt"
    done = subprocess.run(
        [sys.executable, str(RUNS), str(out)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


# --- the numbers of stochastic rounding, as plain integers ---


def mix32(x: Any) -> Any:
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def words(seed: int, step: int, stream: int, index: Any) -> tuple[Any, Any]:
    """The two random words of an element, from Python integers or, `index`, a tensor of int64."""
    key = 0x9E3779B9
    for number in (seed & 0xFFFFFFFF, seed >> 32, step, stream):
        key = mix32(key ^ number)
    key = mix32(key ^ (index >> 32))
    one = mix32(mix32((index & 0xFFFFFFFF) + key & 0xFFFFFFFF) ^ key)
    return one, mix32(one ^ 0x85EBCA6B ^ key)


def stochastic(value: Tensor, draw: Tensor) -> Tensor:
    """bfloat16 below value + draw · 2⁻¹⁶ units in bfloat16's last place, for finite values far from overflow."""
    bits = value.float().view(torch.int32) + draw.int()
    return (bits >> 16).to(torch.int16).view(BF16)


def nearest(value: Tensor, draw: Tensor) -> Tensor:
    return value.float().to(BF16)


@pytest.mark.parametrize("first", FIRSTS)
def test_random_numbers_are_the_plain_definitions(found: dict[str, Any], first: int) -> None:
    one, other = found["draws"][first]
    expected = [words(SEED, 7, 3, index) for index in range(first, first + DRAWS)]
    assert list(zip(one.tolist(), other.tolist(), strict=True)) == expected


def test_random_numbers_depend_on_every_part_of_their_key(found: dict[str, Any]) -> None:
    first = FIRSTS[1]
    one = found["draws"][first][0].tolist()
    for seed, step, stream, start in (
        (SEED ^ 1, 7, 3, first),
        (SEED ^ 1 << 32, 7, 3, first),
        (SEED, 8, 3, first),
        (SEED, 7, 4, first),
        (SEED, 7, 3, first + 1),
        (SEED, 7, 3, first + (1 << 32)),
    ):
        other = [words(seed, step, stream, index)[0] for index in range(start, start + DRAWS)]
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 3


def test_rounding_of_every_kind_of_number(found: dict[str, Any]) -> None:
    values, draws = rounding_inputs()
    to_nearest, to_either = found["rounded"]
    bits = values.view(torch.int32)
    nan = values.isnan()
    assert torch.equal(to_nearest.isnan(), nan)
    assert torch.equal(to_either.isnan(), nan)
    assert torch.equal(to_nearest[~nan].view(torch.int16), values.to(BF16)[~nan].view(torch.int16))
    # adds nothing from the greatest finite bfloat16 on
    carries = (bits & 0x7FFFFFFF) < 0x7F7F0000
    expected = ((bits + draws * carries) >> 16).to(torch.int16).view(BF16)
    assert torch.equal(to_either[~nan].view(torch.int16), expected[~nan].view(torch.int16))
    assert torch.equal(to_either[~nan].isinf(), values[~nan].isinf())


def test_bias_corrections_are_exact_to_two_units_in_the_last_place(found: dict[str, Any]) -> None:
    exact = torch.tensor([1 - beta**step for beta in BETAS for step in STEPS], dtype=torch.float64)
    # 1 − βᵗ in fp64 itself loses digits where β is near 1
    exact = torch.where(exact < 1e-3, -torch.expm1(torch.tensor(_logs(), dtype=torch.float64)), exact)
    error = ((found["corrections"].double() - exact) / exact).abs()
    assert error.max() < 2 * 2**-23


def _logs() -> list[float]:
    return [step * torch.tensor(beta, dtype=torch.float64).log().item() for beta in BETAS for step in STEPS]


# --- one update in fp64 ---


@dataclass(frozen=True)
class Before:
    """One entry before an update, with what the update is given. value: the fp64 parameter that is updated."""

    settings: Settings
    entry: Entry
    lr: float
    coefficient: float
    seed: int
    step: int
    value: Tensor
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    extra: Tensor | None


@dataclass(frozen=True)
class After:
    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    extra: Tensor | None


def exact_update(b: Before) -> tuple[Tensor, Tensor, Tensor]:
    s, one = b.settings, torch.tensor(b.coefficient).double()
    g, m, v = b.grad.double() * one, b.exp_avg.double(), b.exp_avg_sq.double()
    m = s.beta1 * m + (1 - s.beta1) * g
    v = s.beta2 * v + (1 - s.beta2) * g * g
    root = v.sqrt() / (1 - s.beta2**b.step) ** 0.5
    p = b.value * (1 - b.lr * s.weight_decay) - b.lr / (1 - s.beta1**b.step) * m / (root + s.eps)
    return p, m, v


def torch_update(b: Before) -> tuple[Tensor, Tensor, Tensor]:
    """What torch.optim.AdamW gives in fp32."""
    s = b.settings
    p = torch.nn.Parameter(b.value.float())
    p.grad = b.grad.float() * b.coefficient
    optimizer = torch.optim.AdamW(
        [p], lr=b.lr, betas=(s.beta1, s.beta2), eps=s.eps, weight_decay=s.weight_decay, fused=True
    )
    optimizer.state[p] = {
        "step": torch.tensor(b.step - 1.0),
        "exp_avg": b.exp_avg.float().clone(),
        "exp_avg_sq": b.exp_avg_sq.float().clone(),
    }
    optimizer.step()
    state = optimizer.state[p]
    return p.detach(), state["exp_avg"], state["exp_avg_sq"]


def mutated(b: Before) -> Iterator[tuple[str, Before]]:
    """The update with a part missing or wrong."""
    s = b.settings
    yield "no coefficient", replace(b, coefficient=1.0)
    if s.weight_decay and bool(b.value.any()):
        yield "no weight decay", replace(b, settings=replace(s, weight_decay=0.0))
    yield "lr of the step before", replace(b, lr=b.lr / 0.9)
    if b.step < 100:
        yield "step not counted", replace(b, step=b.step + 1)
    yield "other β1", replace(b, settings=replace(s, beta1=s.beta1 + 0.02))
    yield "other β2", replace(b, settings=replace(s, beta2=s.beta2 - 0.02))
    if s.eps > 1e-6:
        yield "no eps", replace(b, settings=replace(s, eps=0.0))


def updates_of(name: str, found: dict[str, Any]) -> Iterator[tuple[Before, After]]:
    """Every update of every entry of a case, from what the kernels left before to what they made of it."""
    case = CASES[name]
    states, _ = found["updates"][name]
    before = vars(build(case))
    flat = [(settings, entry) for settings, entries in case.groups for entry in entries]
    for update, after in enumerate(states):
        for i, (settings, entry) in enumerate(flat):
            param, extra = before["params"][i], before["extras"][i]
            value = param.double()
            if settings.precision == "master":
                value = extra.double()
            elif settings.precision == "kahan":
                value = param.double() + extra.double()
            yield (
                Before(
                    settings=settings,
                    entry=entry,
                    lr=lr_at(settings, update),
                    coefficient=case.coefficient,
                    seed=case.seed,
                    step=entry.steps + update + 1,
                    value=value,
                    param=param,
                    grad=before["grads"][i][update],
                    exp_avg=before["exp_avgs"][i],
                    exp_avg_sq=before["exp_avg_sqs"][i],
                    extra=extra,
                ),
                After(after["params"][i], after["exp_avgs"][i], after["exp_avg_sqs"][i], after["extras"][i]),
            )
        before = after


def cases_of(*precisions: str) -> list[str]:
    """The cases whose entries are updated and all of these precisions."""
    return [
        name
        for name, case in CASES.items()
        if not case.skip and {settings.precision for settings, _ in case.groups} <= {*precisions}
    ]


def hold_update(b: Before, p: Tensor, m: Tensor, v: Tensor, name: str) -> None:
    exact, own = exact_update(b), torch_update(b)
    wrong = {mutation: exact_update(mutant) for mutation, mutant in mutated(b)}
    names = ("param", "exp_avg", "exp_avg_sq")
    for index, (label, tensor) in enumerate(zip(names, (p, m, v), strict=True)):
        scale = exact[index].abs().max()
        # a mutation counts for the tensors that it changes by more than fp32 can hold
        dropped = {
            mutation: tensors[index].float()
            for mutation, tensors in wrong.items()
            if (tensors[index] - exact[index]).abs().max() > 1e-6 * scale
        }
        hold(tensor, exact[index], own[index], f"{name}: {label}", **dropped)
    caught = {mutation for mutation, tensors in wrong.items() if (tensors[0] - exact[0]).abs().max() > 0}
    assert len(caught) >= 3


@pytest.mark.parametrize("name", cases_of("fp32", "master"))
def test_fp32_and_master_hold_the_accuracy_rule(found: dict[str, Any], name: str) -> None:
    for b, after in updates_of(name, found):
        if b.entry.numel == 0:
            continue
        p = after.extra if b.settings.precision == "master" else after.param
        assert p is not None
        hold_update(b, p, after.exp_avg, after.exp_avg_sq, f"{name}: {b.entry}")
        if b.settings.precision == "master":
            assert torch.equal(after.param.view(torch.int16), p.to(BF16).view(torch.int16))


Rounding = Callable[[Tensor, Tensor], Tensor]


def rounded_from(bits: Tensor, exact: Tensor, scale: Tensor, draw: Tensor, rounding: Rounding) -> bool:
    """Whether `bits` (bfloat16) is what `rounding` gives for numbers within the fp32 error of `exact`. scale: of the
    terms that were summed."""
    slack = 4 * 2**-24 * scale
    one, other = rounding(exact - slack, draw).double(), rounding(exact + slack, draw).double()
    return bool(((torch.minimum(one, other) <= bits) & (bits <= torch.maximum(one, other))).all())


@pytest.mark.parametrize("name", cases_of("stochastic", "kahan"))
def test_bfloat16_is_rounded_with_the_numbers_of_its_key(found: dict[str, Any], name: str) -> None:
    for b, after in updates_of(name, found):
        p, m, v = exact_update(b)
        index = torch.arange(b.entry.offset, b.entry.offset + b.entry.numel)
        one, other = words(b.seed, b.step, b.entry.stream, index)
        g = b.grad.double() * b.coefficient
        # the terms of m may cancel
        terms = (b.exp_avg.double().abs() + g.abs()) / m.abs().clamp(min=1e-300)
        scale = b.value.abs() + (p - b.value).abs() * terms
        todo: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        if b.settings.state == BF16:
            todo.append((after.exp_avg, m, b.exp_avg.double().abs() + g.abs(), one >> 16))
            todo.append((after.exp_avg_sq, v, v, other & 0xFFFF))
        else:
            assert b.settings.precision == "stochastic"
            assert after.exp_avg.dtype == after.exp_avg_sq.dtype == FP32
            if b.entry.numel:
                own = torch_update(b)
                hold(after.exp_avg, m, own[1])
                hold(after.exp_avg_sq, v, own[2])
        if b.settings.precision == "stochastic":
            todo.append((after.param, p, scale, one & 0xFFFF))
        else:
            left = p - after.param.double()
            assert after.extra is not None
            assert rounded_from(after.param, p, scale, one, nearest)
            assert rounded_from(after.extra, left, scale, one, nearest)
            if b.entry.numel > 100:
                assert not rounded_from(after.extra, -left, scale, one, nearest)
                assert not rounded_from(torch.zeros_like(after.extra), left, scale, one, nearest)
                assert not rounded_from(after.param.roll(1), p, scale, one, nearest)
        for bits, exact, size, draw in todo:
            assert rounded_from(bits, exact, size, draw, stochastic)
            if b.entry.numel > 100:
                for mutant in (torch.zeros_like(bits), -bits, bits.roll(1), 2 * bits, exact.to(BF16)):
                    assert not rounded_from(mutant, exact, size, draw, stochastic)
                assert not rounded_from(bits, exact, size, draw.roll(1), stochastic)
                for mutation, mutant in mutated(b):
                    changed = exact_update(mutant)
                    which = next(i for i, tensor in enumerate((p, m, v)) if tensor is exact)
                    if (changed[which] - exact).abs().max() > 2**-12 * exact.abs().max():
                        assert not rounded_from(bits, changed[which], size, draw, stochastic), mutation


@pytest.mark.parametrize("name", ["stochastic", "kahan", "stochastic, fp32 moments"])
def test_stochastic_rounding_is_unbiased_and_within_one_unit(found: dict[str, Any], name: str) -> None:
    errors: dict[str, list[Tensor]] = {"param": [], "exp_avg": [], "exp_avg_sq": []}
    for b, after in updates_of(name, found):
        for (label, collected), exact in zip(errors.items(), exact_update(b), strict=True):
            bits = getattr(after, label)
            if bits.dtype == BF16 and not (name == "kahan" and label == "param"):
                unit = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)
                collected.append(((bits.double() - exact) / unit)[exact != 0])
    for collected in errors.values():
        if collected:
            error = torch.cat(collected)
            assert error.abs().max() < 1.001
            assert error.mean().abs() < 4 * error.std() / len(error) ** 0.5
            assert error.std() > 0.3


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16 if tensor.dtype == BF16 else torch.int32)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.skip])
def test_a_skipped_update_leaves_every_bit(found: dict[str, Any], name: str) -> None:
    before = vars(build(CASES[name]))
    for after in found["updates"][name][0]:
        for key in STATES:
            for one, other in zip(before[key], after[key], strict=True):
                assert one is other is None or torch.equal(bits_of(one), bits_of(other))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.skip])
def test_every_update_counts_its_step_and_reads_the_gradients_alone(found: dict[str, Any], name: str) -> None:
    before = vars(build(CASES[name]))
    states, launches = found["updates"][name]
    assert launches == [CASES[name].launches] * CASES[name].updates
    for update, after in enumerate(states):
        for one, other in zip(before["steps"], after["steps"], strict=True):
            assert other == one + update + 1
        for one, other in zip(before["grads"], after["grads"], strict=True):
            assert all(torch.equal(bits_of(a), bits_of(b)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["stochastic", "kahan"])
def test_shards_round_as_their_whole(found: dict[str, Any], name: str) -> None:
    wholes, shards = found["updates"][f"{name}: whole"][0], found["updates"][f"{name}: shards"][0]
    for whole, parts in zip(wholes, shards, strict=True):
        for key in ("params", "exp_avgs", "exp_avg_sqs", *(["extras"] if name == "kahan" else [])):
            assert torch.equal(bits_of(torch.cat(parts[key])), bits_of(whole[key][0]))


def test_all_precisions_in_one_call_are_each_alone(found: dict[str, Any]) -> None:
    assert len(found["updates"]["all kinds"][0][0]["params"]) == len(KINDS)
    for b, after in updates_of("all kinds", found):
        p, _, _ = exact_update(b)
        value = after.extra if b.settings.precision == "master" else after.param
        assert value is not None
        eps = 2**-22 if value.dtype == FP32 else 2**-7
        assert ((value.double() - p).abs() <= eps * (b.value.abs() + b.lr)).all()


@pytest.mark.parametrize("name", norm_cases())
def test_norm(found: dict[str, Any], name: str) -> None:
    grads = norm_cases()[name]
    norm, (coefficient, skip), launches = found["norms"][name]
    assert norm.shape == ()
    assert norm.dtype == FP32
    assert launches == 3
    exact = torch.cat([grad.double().flatten() for grad in grads]).norm()
    own = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
    if exact.isfinite() and exact > 0:
        hold(norm, exact, exact.float(), name)
        assert skip == 0
        assert (coefficient - own).abs() <= 2**-23 * own
    elif exact == 0:
        assert norm == 0
        assert skip == 0
        assert coefficient == 1
    else:
        assert torch.equal(norm, exact.float()) or (norm.isnan() and exact.isnan())
        assert skip.isnan()


def test_the_table_has_the_cases_that_break_kernels() -> None:
    """Not whole chunks, whole ones, empty, misaligned tensors, and an index beyond 32 bits."""
    entries = [entry for case in CASES.values() for _, entries in case.groups for entry in entries]
    assert any(entry.shift for entry in entries)
    assert any(entry.numel == 0 for entry in entries)
    assert any(entry.offset < 1 << 32 < entry.offset + entry.numel for entry in entries)
    assert any(isinstance(case, Case) and case.seed == 1 for case in CASES.values())
