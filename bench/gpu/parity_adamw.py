"""AdamW and 8-bit AdamW on the device: against fp64 and torch's own error; the bits of stochastic rounding and the
8-bit codes against the definition in plain torch on the CPU; no wait for the device, and few launches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accuracy import hold
from gpu.device import Machine, moved
from gpu.record import Record
from tunesmith_kernels.adamw import AdamW, paths
from tunesmith_kernels.adamw.reference import update as reference_update
from tunesmith_kernels.adamw.tensors import Group
from tunesmith_kernels.adamw8bit import AdamW8bit
from tunesmith_kernels.adamw8bit import paths as paths8
from tunesmith_kernels.adamw8bit.codebook import standard_books
from tunesmith_kernels.adamw8bit.reference import update as reference_update8
from tunesmith_kernels.adamw8bit.tensors import Group as Group8

FP32, BF16 = torch.float32, torch.bfloat16
SIZES = (1, 17, 4096, 65_537, 1_000_003)
STEPS = 6
MAX_NORM = 1.0
BETAS, LR, EPS, DECAY = (0.9, 0.999), 1e-3, 1e-8, 0.1
# Where fused multiply-adds round once and the CPU twice, an element falls on the other side of its draw: about one in
# 2¹⁶ units of bf16's last place × a few fp32 roundings. Far above that, and far below what another draw would give.
OTHER_SIDE = 5e-3
LAUNCHES = 5


def run(machine: Machine, record: Record) -> None:
    """Part parity_adamw."""
    sizes = machine.pick(SIZES, SIZES, (1, 17, 3001))
    checks: dict[str, Callable[[], None]] = {
        "AdamW fp32": lambda: _exactness(machine, sizes, "fp32"),
        "AdamW master": lambda: _exactness(machine, sizes, "master"),
        "norm": lambda: _norm(machine),
        "a norm that is not finite": lambda: _suppressed(machine),
        "stochastic rounding, bits": lambda: _rounding_bits(machine, sizes),
        "stochastic rounding, unbiased": lambda: _unbiased(machine),
        "AdamW8bit, codes": lambda: _codes(machine),
        **{f"AdamW {name}, updates": _close(machine, sizes, name) for name in ("stochastic", "kahan")},
        "AdamW8bit, updates": lambda: _close8(machine, sizes),
    }
    done = 0
    try:
        for name, check in checks.items():
            with record.attempt(name, needs=2):
                check()
                done += 1
    finally:
        record.row("all", "checks passed", done, "checks")
    for name, make in _optimizers(machine).items():
        with record.attempt(f"{name}: launches and waits", needs=2):
            _launches(machine, record, name, make)


def _values(sizes: Sequence[int], seed: int, scale: float) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=random) * scale for size in sizes]


def _gradients(sizes: Sequence[int], step: int, dtype: torch.dtype) -> list[Tensor]:
    return [grad.to(dtype) for grad in _values(sizes, 100 + step, 0.1 * (1 + step % 3))]


def _stepped(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    sizes: Sequence[int],
    before: Callable[[], Any] = lambda: None,
) -> None:
    for step in range(STEPS):
        for param, grad in zip(params, _gradients(sizes, step, BF16), strict=True):
            param.grad = grad.to(param)
        before()
        optimizer.step()


def _exactness(machine: Machine, sizes: Sequence[int], precision: Any) -> None:
    """Parameters and moments of fp32 updates, clipped. The gradients are bf16 numbers in both precisions."""
    initial = [value.to(BF16).to(machine.device) for value in _values(sizes, 0, 0.1)]
    dtype = FP32 if precision == "fp32" else BF16
    options: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    ours = [nn.Parameter(value.to(dtype, copy=True)) for value in initial]
    optimizer = AdamW(
        ours, **options, precision=precision, max_norm=MAX_NORM, backend=machine.optimizer_backend
    )
    _stepped(optimizer, ours, sizes)
    theirs = [nn.Parameter(value.float()) for value in initial]
    torchs = torch.optim.AdamW(theirs, **options, foreach=False)
    _stepped(torchs, theirs, sizes, lambda: nn.utils.clip_grad_norm_(theirs, MAX_NORM))
    for index, exact in enumerate(_exact(initial, sizes)):
        mine, own = optimizer.state[ours[index]], torchs.state[theirs[index]]
        param = ours[index].detach() if precision == "fp32" else mine["master"]
        if precision == "master":
            assert torch.equal(ours[index].detach(), param.to(BF16)), "a parameter is not its master rounded"
        hold(param, exact["param"], theirs[index].detach(), "parameter")
        for name in ("exp_avg", "exp_avg_sq"):
            hold(mine[name], exact[name], own[name], name)
    total = torch.cat([g.double().flatten() for g in _gradients(sizes, STEPS - 1, BF16)]).norm()
    assert optimizer.last_grad_norm is not None
    assert abs(optimizer.last_grad_norm.item() / total.item() - 1) < 1e-6, "the norm is another"


def _exact(initial: Sequence[Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    """Loshchilov and Hutter's formula in fp64."""
    found = [
        {
            "param": value.double(),
            "exp_avg": torch.zeros_like(value, dtype=torch.float64),
            "exp_avg_sq": torch.zeros_like(value, dtype=torch.float64),
        }
        for value in initial
    ]
    for step in range(1, STEPS + 1):
        grads = [grad.double().to(initial[0].device) for grad in _gradients(sizes, step - 1, BF16)]
        coefficient = min(1.0, MAX_NORM / (torch.cat(grads).norm().item() + 1e-6))
        for state, grad in zip(found, grads, strict=True):
            g, (p, m, v) = grad * coefficient, state.values()
            m.mul_(BETAS[0]).add_((1 - BETAS[0]) * g)
            v.mul_(BETAS[1]).add_((1 - BETAS[1]) * g * g)
            size = LR / (1 - BETAS[0] ** step)
            p.mul_(1 - LR * DECAY).sub_(size * m / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS))
    return found


def _norm(machine: Machine) -> None:
    """Over many tensors, both dtypes, huge and tiny values."""
    way = paths.path(machine.optimizer_backend, machine.device)
    for scale in (1.0, 1e35, 1e-26):
        grads = [
            grad.to(dtype).to(machine.device)
            for dtype in (FP32, BF16)
            for grad in _values([7] * 50 + [100_003], 3, scale)
        ]
        exact = torch.cat([grad.double() for grad in grads]).norm().item()
        found = way.norm(grads).item()
        assert abs(found / exact - 1) < 3e-7, f"at {scale:g}: {found!r} for {exact!r}"


def _suppressed(machine: Machine) -> None:
    params = [nn.Parameter(value.to(BF16).to(machine.device)) for value in _values((1000, 77), 0, 0.1)]
    optimizer = AdamW(params, precision="stochastic", max_norm=1.0, backend=machine.optimizer_backend, seed=5)
    _stepped(optimizer, params, (1000, 77))
    before = [param.detach().clone() for param in params]
    states = [value.clone() for param in params for value in optimizer.state[param].values()]
    assert params[0].grad is not None
    params[0].grad[3] = torch.inf
    optimizer.step()
    after = [value for param in params for value in optimizer.state[param].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True)), "a parameter moved"
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True)), "a state moved"


def _group(
    sizes: Sequence[int], precision: Any, betas: tuple[float, float], lr: float, first: int = 0
) -> Group:
    state = FP32 if precision in ("fp32", "master") else BF16
    params = [value.to(BF16) for value in _values(sizes, 1, 0.02)]
    extras = {
        "master": [param.float() for param in params],
        "kahan": [torch.zeros_like(param) for param in params],
    }
    return Group(
        precision=precision,
        params=params,
        grads=_gradients(sizes, 0, BF16),
        exp_avgs=[torch.zeros_like(param, dtype=state) for param in params],
        exp_avg_sqs=[torch.zeros_like(param, dtype=state) for param in params],
        extras=extras.get(precision, []),
        steps=[torch.tensor(float(3 * index)) for index in range(len(params))],
        streams=list(range(len(params))),
        offsets=[first] * len(params),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=EPS,
        weight_decay=DECAY,
    )


def _both(
    machine: Machine, group: Any, theirs: Callable[..., None], ours: Callable[..., None], updates: int = 1
) -> tuple[Any, Any]:
    """The group after the updates: by the definition on the CPU, and on the device, back on the CPU."""
    there = moved(group, machine.device)
    if "books" in {f.name for f in dataclasses.fields(group)}:
        there = dataclasses.replace(there, books=standard_books(machine.device))
    coefficient, skip, seed = torch.tensor(0.37), torch.tensor(0.0), 0xFEDC_BA98_7654_3210
    for _ in range(updates):
        theirs([group], coefficient, skip, seed)
        ours([there], coefficient.to(machine.device), skip.to(machine.device), seed)
    return group, moved(there, torch.device("cpu"))


def _rounding_bits(machine: Machine, sizes: Sequence[int]) -> None:
    """With β = 0 the moments are the gradient × 0.37 and its square, each one fp32 rounding on every device: what is
    stored is rounded stochastically, bit for bit as on the CPU; also where the index of an element exceeds 2³²."""
    way = paths.path(machine.optimizer_backend, machine.device)
    for first in (0, (1 << 32) - 300):
        for precision in ("stochastic", "kahan"):
            group = _group(sizes, precision, (0.0, 0.0), 0.0, first)
            theirs, ours = _both(machine, group, reference_update, way.update)
            for name in ("exp_avgs", "exp_avg_sqs", "params", "steps"):
                for a, b in zip(getattr(theirs, name), getattr(ours, name), strict=True):
                    assert torch.equal(a, b), f"{precision}: {name} differ in {(a != b).sum()} of {a.numel()}"


def _unbiased(machine: Machine) -> None:
    """The mean of many roundings of one number is the number, within 4σ; each is one of its neighbours."""
    count = machine.pick(1 << 20, 1 << 20, 1 << 14)
    group = dataclasses.replace(
        _group((count,), "stochastic", (0.0, 0.0), 0.0), grads=[torch.full((count,), 1.0, dtype=BF16)]
    )
    _, ours = _both(
        machine, group, reference_update, paths.path(machine.optimizer_backend, machine.device).update
    )
    value, unit = torch.tensor(0.37).item(), 2.0**-9
    found = ours.exp_avgs[0].double()
    below = torch.tensor(value).div(unit).floor().item() * unit
    assert set(found.unique().tolist()) == {below, below + unit}, "not its neighbours"
    share = (value - below) / unit
    sigma = unit * (share * (1 - share) / count) ** 0.5
    assert abs(found.mean().item() - value) < 4 * sigma, f"biased by {found.mean().item() - value:g}"


def _close(machine: Machine, sizes: Sequence[int], precision: str) -> Callable[[], None]:
    def check() -> None:
        way = paths.path(machine.optimizer_backend, machine.device)
        theirs, ours = _both(machine, _group(sizes, precision, BETAS, LR), reference_update, way.update)
        for name in ("params", "exp_avgs", "exp_avg_sqs"):
            for a, b in zip(getattr(theirs, name), getattr(ours, name), strict=True):
                _near_bits(a, b, f"{precision} {name}")

    return check


def _near_bits(a: Tensor, b: Tensor, name: str) -> None:
    """bf16 tensors that are equal but for few elements, which are neighbours. That the rule has teeth: it fails where
    rows are rolled."""

    def passes(x: Tensor) -> bool:
        apart = (a.view(torch.int16).int() - x.view(torch.int16).int()).abs()
        return bool(apart.amax() <= 1) and int((apart > 0).sum()) <= 1 + OTHER_SIDE * a.numel()

    assert passes(b), f"{name}: {(a != b).sum()} of {a.numel()} differ"
    assert a.numel() < 100 or not passes(b.roll(1)), f"{name}: the mutant 'rolled' passes"


def _group8(sizes: Sequence[int], betas: tuple[float, float], lr: float, *, stochastic: bool) -> Group8:
    params = [value.to(BF16) for value in _values(sizes, 1, 0.02)]
    blocks = [-(-size // 256) for size in sizes]
    codes = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    return Group8(
        params=params,
        grads=[
            (grad * torch.exp(3 * noise)).to(BF16)
            for grad, noise in zip(_values(sizes, 8, 1e-3), _values(sizes, 9, 1.0), strict=True)
        ],
        states1=[code.clone() for code in codes],
        states2=codes,
        absmaxes1=[torch.zeros(count) for count in blocks],
        absmaxes2=[torch.zeros(count) for count in blocks],
        steps=[torch.tensor(0.0) for _ in sizes],
        books=standard_books(torch.device("cpu")),
        block_size=256,
        stochastic=stochastic,
        streams=list(range(len(sizes))),
        offsets=[0] * len(sizes),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=EPS,
        weight_decay=DECAY,
    )


_STATES8 = ("states1", "states2", "absmaxes1", "absmaxes2")


def _codes(machine: Machine) -> None:
    """With β = 0 what is encoded is the gradient × 0.37 and its square: the codes and scales are the CPU's, bit for
    bit."""
    way = paths8.path(machine.optimizer_backend, machine.device)
    group = _group8(
        machine.pick((1_000_003, 255), (1_000_003, 255), (5003, 255)), (0.0, 0.0), 0.0, stochastic=False
    )
    theirs, ours = _both(machine, group, reference_update8, way.update)
    for name in (*_STATES8, "params", "steps"):
        for a, b in zip(getattr(theirs, name), getattr(ours, name), strict=True):
            assert torch.equal(a, b), f"{name}: {(a != b).sum()} of {a.numel()} differ"


def _close8(machine: Machine, sizes: Sequence[int]) -> None:
    way = paths8.path(machine.optimizer_backend, machine.device)
    theirs, ours = _both(machine, _group8(sizes, BETAS, LR, stochastic=True), reference_update8, way.update)
    for a, b in zip(theirs.params, ours.params, strict=True):
        _near_bits(a, b, "params")
    for name in ("states1", "states2"):
        for a, b in zip(getattr(theirs, name), getattr(ours, name), strict=True):
            apart = (a.int() - b.int()).abs()
            assert apart.amax() <= 1, f"{name}: a code is {apart.amax()} off"
            assert (apart > 0).sum() <= 1 + OTHER_SIDE * a.numel(), f"{name}: {(apart > 0).sum()} differ"


def _optimizers(machine: Machine) -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    backend = machine.optimizer_backend
    return {
        "AdamW fp32, max_norm": lambda params: AdamW(
            [nn.Parameter(p.detach().float()) for p in params], max_norm=1.0, backend=backend
        ),
        **{
            f"AdamW {precision}, max_norm": lambda params, precision=precision: AdamW(
                params, precision=precision, max_norm=1.0, backend=backend
            )
            for precision in ("master", "stochastic", "kahan")
        },
        "AdamW stochastic": lambda params: AdamW(params, precision="stochastic", backend=backend),
        "AdamW8bit, max_norm": lambda params: AdamW8bit(params, max_norm=1.0, backend=backend),
    }


def _launches(
    machine: Machine,
    record: Record,
    name: str,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    """Of a step in the middle of training, over 40 tensors of two sizes."""
    params = [nn.Parameter(value.to(BF16).to(machine.device)) for value in _values((5000, 8192) * 20, 0, 0.1)]
    optimizer = make(params)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    for _ in range(3):
        optimizer.step()
    if machine.device.type != "cuda":
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = kernels_of(optimizer.step)
    record.row(name, "launches of a step", len(kernels), "kernels", f"<= {LAUNCHES}")
    record.note(f"{name}: {', '.join(kernels)}")


def kernels_of(call: Callable[[], object]) -> list[str]:
    """The names of the kernels that a call launches, copies and fills of memory included where they are kernels."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    results: Any = profile.profiler
    names: list[str] = []
    for event in results.kineto_results.events():
        annotation = getattr(event, "is_user_annotation", lambda: False)()
        on_device = event.device_type().name == "CUDA"
        if on_device and not annotation and not event.name().startswith(("Mem", "Optimizer.", "gpu_user")):
            names.append(event.name().split("(")[0].split("<")[0][-60:])
    return names
