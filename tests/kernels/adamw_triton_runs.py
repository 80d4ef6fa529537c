"""The cases of test_adamw_triton, and the program that runs them in triton's interpreter: it wants a process of its
own, since triton reads TRITON_INTERPRET when a kernel is defined.

    TRITON_INTERPRET=1 python adamw_triton_runs.py OUT.pt
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith_kernels import triton_support
from tunesmith_kernels.adamw import triton_kernels, triton_step
from tunesmith_kernels.adamw.tensors import Group, Precision
from tunesmith_kernels.triton_numbers import random_pair, rounded_nearest, rounded_stochastic, stream_key

BF16, FP32 = torch.bfloat16, torch.float32
SEED = 0xFEDC_BA98_7654_3210


@dataclass(frozen=True)
class Entry:
    """One tensor. shift: elements by which its storage is off a 16-byte boundary; size: of the parameter's values."""

    numel: int
    stream: int = 0
    offset: int = 0
    steps: int = 0
    shift: int = 0
    size: float = 0.02


@dataclass(frozen=True)
class Settings:
    precision: Precision = "fp32"
    state: torch.dtype = FP32
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Case:
    """Groups of entries, and `updates` updates of them; lr falls by a tenth at each."""

    groups: tuple[tuple[Settings, tuple[Entry, ...]], ...]
    updates: int = 2
    coefficient: float = 0.37
    skip: float = 0.0
    seed: int = SEED
    launches: int = 1  # of one update


# more than a chunk and not whole; whole vectors; less than a block; one; none; a chunk; misaligned
_ENTRIES = (
    Entry(triton_step.UPDATE.chunk_size * 2 + 1029, stream=0),
    Entry(4104, stream=1, steps=1),
    Entry(17, stream=2, steps=40),
    Entry(1, stream=3, steps=5000),
    Entry(0, stream=4),
    Entry(triton_step.UPDATE.chunk_size, stream=5),
    Entry(3001, stream=6, shift=3),
)
KINDS: dict[str, Settings] = {
    "fp32": Settings(),
    "master": Settings("master"),
    "stochastic": Settings("stochastic", BF16),
    "stochastic, fp32 moments": Settings("stochastic", FP32),
    "kahan": Settings("kahan", BF16),
}
_EDGE = Entry(
    2500, stream=1, offset=(1 << 32) - 1301, steps=2
)  # the index's upper half changes within a block


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for name, settings in KINDS.items():
        cases[name] = Case(((settings, _ENTRIES),))
        cases[f"{name}: skip"] = Case(((settings, _ENTRIES),), skip=1.0)
        cases[f"{name}: settings"] = Case(
            (
                (settings, (Entry(1500), Entry(40, stream=1))),
                (replace(settings, lr=0.02, weight_decay=0.3), (Entry(2000, stream=2, steps=3),)),
                (replace(settings, beta1=0.0, beta2=0.5, eps=1e-3), (Entry(1100, stream=3, steps=9),)),
                (
                    replace(settings, beta1=0.95, beta2=0.95, weight_decay=0.0),
                    (Entry(900, stream=4, steps=700),),
                ),
            )
        )
        cases[f"{name}: from zero"] = Case(
            (
                (
                    settings,
                    tuple(Entry(1000, stream=i, steps=t, size=0.0) for i, t in enumerate((0, 5, 10_000))),
                ),
            )
        )
        cases[f"{name}: far"] = Case(((settings, (_EDGE,)),))
    whole, cut = Entry(20000, stream=8, offset=5), 9001
    for name in ("stochastic", "kahan"):
        shards = (
            replace(whole, numel=cut),
            replace(whole, numel=whole.numel - cut, offset=whole.offset + cut),
        )
        cases[f"{name}: whole"] = Case(((KINDS[name], (whole,)),))
        cases[f"{name}: shards"] = Case(((KINDS[name], shards),))
    cases["all kinds"] = Case(
        tuple((s, (Entry(300, stream=i),)) for i, s in enumerate(KINDS.values())), launches=5
    )
    cases["small seed"] = Case(((KINDS["stochastic"], (Entry(2000),)),), seed=1)
    return cases


CASES = _cases()


@dataclass(frozen=True)
class Tensors:
    """What an update works on, per entry in order, and the gradients of each update."""

    params: list[Tensor] = field(default_factory=list[Tensor])
    exp_avgs: list[Tensor] = field(default_factory=list[Tensor])
    exp_avg_sqs: list[Tensor] = field(default_factory=list[Tensor])
    extras: list[Tensor | None] = field(default_factory=list[Any])
    steps: list[Tensor] = field(default_factory=list[Tensor])
    grads: list[list[Tensor]] = field(default_factory=list[Any])


def _shifted(values: Tensor, shift: int) -> Tensor:
    return torch.cat((values.new_zeros(shift), values))[shift:]


def build(case: Case) -> Tensors:
    """The tensors before the first update: moments as after some steps, where there were some. Values are drawn per
    (stream, global index), so shards are parts of their whole."""
    tensors = Tensors()
    for settings, entries in case.groups:
        plain = FP32 if settings.precision == "fp32" else BF16
        for entry in entries:
            generator = torch.Generator().manual_seed(entry.stream)
            start = entry.offset % 100_000
            draws = torch.randn(4 + case.updates, 150_000, generator=generator)[
                :, start : start + entry.numel
            ]
            value = draws[0] * entry.size
            began = 1.0 if entry.steps else 0.0

            def put(x: Tensor, dtype: torch.dtype, shift: int = entry.shift) -> Tensor:
                return _shifted(x.to(dtype), shift)

            tensors.params.append(put(value, plain))
            tensors.exp_avgs.append(put(draws[1] * 0.01 * began, settings.state))
            tensors.exp_avg_sqs.append(put((draws[2].square() + 0.5) * 1e-4 * began, settings.state))
            match settings.precision:
                case "master":
                    tensors.extras.append(put(value, FP32))
                case "kahan":
                    tensors.extras.append(put(draws[3] * entry.size * 2**-10 * began, BF16))
                case _:
                    tensors.extras.append(None)
            tensors.steps.append(torch.tensor(float(entry.steps)))
            tensors.grads.append([put(draws[4 + i] * 0.05, plain) for i in range(case.updates)])
    return tensors


def groups_of(case: Case, tensors: Tensors, update: int) -> list[Group]:
    groups: list[Group] = []
    first = 0
    for settings, entries in case.groups:
        part = slice(first, first + len(entries))
        first += len(entries)
        groups.append(
            Group(
                precision=settings.precision,
                params=tensors.params[part],
                grads=[grads[update] for grads in tensors.grads[part]],
                exp_avgs=tensors.exp_avgs[part],
                exp_avg_sqs=tensors.exp_avg_sqs[part],
                extras=[extra for extra in tensors.extras[part] if extra is not None],
                steps=tensors.steps[part],
                streams=[entry.stream for entry in entries],
                offsets=[entry.offset for entry in entries],
                lr=lr_at(settings, update),
                beta1=settings.beta1,
                beta2=settings.beta2,
                eps=settings.eps,
                weight_decay=settings.weight_decay,
            )
        )
    return groups


def lr_at(settings: Settings, update: int) -> float:
    return settings.lr * 0.9**update


def norm_cases() -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    chunk = triton_step.NORM.chunk_size
    big = normal(chunk * 2 + 7)
    cases = {
        "one": [normal(1)],
        "odd sizes": [normal(n) for n in (3, chunk + 1, 17, chunk, 0, 2048)],
        "matrices": [normal(33, 65), normal(7, 5, 3)],
        "bf16": [normal(5001).to(BF16), normal(chunk + 8).to(BF16)],
        "mixed": [
            normal(5001).to(BF16),
            normal(4096),
            _shifted(normal(777), 1),
            _shifted(normal(900).to(BF16), 3),
        ],
        "many chunks": [big, *(normal(100) for _ in range(1030))],
        "huge": [normal(4000, scale=1e36), normal(10)],
        "tiny": [normal(4000, scale=1e-26)],
        "wide": [torch.tensor([1e30, 1.0, 1e-20]), torch.tensor([3e38])],
        "zeros": [torch.zeros(100)],
        "inf": [big, torch.tensor([1.0, float("inf")])],
        "-inf, bf16": [big, torch.tensor([1.0, float("-inf")]).to(BF16)],
        "nan": [torch.tensor([float("nan")]), big],
        "nan beside inf": [torch.tensor([float("nan"), float("inf")])],
    }
    return cases


MAX_NORM = 1.5
BETAS = (0.0, 0.1, 0.5, 0.9, 0.95, 0.98, 0.999, 0.9999, 0.999999)
STEPS = (1, 2, 3, 5, 10, 31, 100, 998, 1000, 4097, 10_000, 100_000, 1_000_000)
FIRSTS = (0, 1, 8192, (1 << 31) - 5, (1 << 32) - 100, (1 << 32) + 3, (5 << 32) - 256, 1 << 40)
DRAWS = 256


@triton.jit
def _corrections(logs: tl.tensor, steps: tl.tensor, out: tl.tensor, size: tl.constexpr):
    index = tl.arange(0, size)
    high, low = tl.load(logs + 2 * index), tl.load(logs + 2 * index + 1)
    tl.store(out + index, triton_kernels.bias_correction(tl.load(steps + index), high, low))


@triton.jit
def _draw(keys: tl.tensor, one: tl.tensor, other: tl.tensor, size: tl.constexpr):
    index = tl.arange(0, size)
    key = stream_key(tl.load(keys), tl.load(keys + 1), tl.load(keys + 2), tl.load(keys + 3))
    first, second = random_pair(key, tl.load(keys + 4), size)
    tl.store(one + index, first.to(tl.int64))
    tl.store(other + index, second.to(tl.int64))


@triton.jit
def _round(
    values: tl.tensor, draws: tl.tensor, nearest: tl.tensor, stochastic: tl.tensor, size: tl.constexpr
):
    index = tl.arange(0, size)
    x = tl.load(values + index)
    tl.store(nearest + index, rounded_nearest(x).to(tl.int16, bitcast=True))
    tl.store(
        stochastic + index,
        rounded_stochastic(x, tl.load(draws + index).to(tl.uint32)).to(tl.int16, bitcast=True),
    )


def rounding_inputs() -> tuple[Tensor, Tensor]:
    """Values of every kind, by their bits, and 16 random bits for each."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(1 << 31), 1 << 31, (4096,), generator=generator).to(torch.int32)
    edges = [
        0,
        1,
        0x7F7F0000,
        0x7F7F8000,
        0x7F7FFFFF,
        0x7F800000,
        0x7F800001,
        0x7FFFFFFF,
        0x3F808000,
        0x3F818000,
    ]
    edges = [*edges, *(edge - (1 << 31) for edge in edges)]
    bits[: len(edges)] = torch.tensor(edges, dtype=torch.int32)
    draws = torch.randint(0, 1 << 16, (4096,), generator=generator).to(torch.int32)
    draws[:5] = 0xFFFF
    return bits.view(FP32), draws


def _numbers() -> dict[str, Any]:
    out: dict[str, Any] = {}
    pairs = [(beta, step) for beta in BETAS for step in STEPS]
    size = triton.next_power_of_2(len(pairs))
    logs = torch.zeros(size, 2)
    logs[: len(pairs)] = torch.tensor([triton_step.split_log(beta) for beta, _ in pairs])
    steps = torch.zeros(size)
    steps[: len(pairs)] = torch.tensor([float(step) for _, step in pairs])
    corrections = torch.empty(size)
    _corrections[(1,)](logs, steps, corrections, size=size)
    out["corrections"] = corrections[: len(pairs)]

    out["draws"] = {}
    for first in FIRSTS:
        keys = torch.tensor([triton_support.signed32(SEED), triton_support.signed32(SEED >> 32), 7, 3, first])
        one, other = torch.zeros(DRAWS, dtype=torch.int64), torch.zeros(DRAWS, dtype=torch.int64)
        _draw[(1,)](keys, one, other, size=DRAWS)
        out["draws"][first] = (one, other)

    values, draws = rounding_inputs()
    nearest, stochastic = (torch.zeros(len(values), dtype=torch.int16) for _ in range(2))
    _round[(1,)](values, draws, nearest, stochastic, size=len(values))
    out["rounded"] = (nearest.view(BF16), stochastic.view(BF16))
    return out


def run() -> dict[str, Any]:
    """What the kernels made of every case: the tensors after each update, and how many launches it took."""
    out: dict[str, Any] = {"updates": {}, "norms": {}, **_numbers()}
    launch = triton_support.launch
    launches = 0

    def counted(*arguments: Any, **options: Any) -> None:
        nonlocal launches
        launches += 1
        launch(*arguments, **options)

    triton_support.launch = counted

    def count(call: Callable[[], Any]) -> tuple[Any, int]:
        nonlocal launches
        launches = 0
        return call(), launches

    for name, case in CASES.items():
        tensors = build(case)
        counts: list[int] = []
        states: list[dict[str, Any]] = []
        for update in range(case.updates):
            groups = groups_of(case, tensors, update)
            coefficient, skip = torch.tensor(case.coefficient), torch.tensor(case.skip)
            _, launched = count(
                lambda g=groups, c=coefficient, s=skip, seed=case.seed: triton_step.update(g, c, s, seed)
            )
            counts.append(launched)
            states.append(copy.deepcopy(vars(tensors)))
        out["updates"][name] = (states, counts)
    for name, grads in norm_cases().items():
        norm, launched = count(lambda grads=grads: triton_step.norm(grads))
        clip, more = count(lambda norm=norm: triton_step.clip(norm, MAX_NORM))
        out["norms"][name] = (norm, clip, launched + more)
    return out


if __name__ == "__main__":
    assert triton_support.interpreting()
    torch.save(run(), sys.argv[1])
