"""Time of an optimizer step beside torch's, torchao's and bitsandbytes', in turns, in one run; and its share of the
bandwidth of a copy, on the fewest bytes that a step can move."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gpu.device import Machine, interleaved, ratio
from gpu.record import Record
from tunesmith_kernels.adamw import AdamW
from tunesmith_kernels.adamw8bit import AdamW8bit

FP32, BF16 = torch.float32, torch.bfloat16
OPTIONS: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}
CLIPPED, FUSED = "tunesmith, clipped", "clip_grad_norm_ + torch fused"


@dataclass(frozen=True)
class Kind:
    """floor: bytes per parameter that an unclipped step reads and writes at least; gradient: bytes of one, which
    clipping reads once more. least: how much faster than clip_grad_norm_ + torch fused it is to be."""

    name: str
    dtype: torch.dtype
    floor: float
    gradient: int
    make: Callable[..., torch.optim.Optimizer]
    least: float | None = None


def kinds(backend: Any) -> tuple[Kind, ...]:
    def adamw(precision: Any, **state: Any) -> Callable[..., torch.optim.Optimizer]:
        return lambda params, **options: AdamW(
            params, **OPTIONS, precision=precision, **state, **options, backend=backend
        )

    def eight(params: Any, **options: Any) -> torch.optim.Optimizer:
        return AdamW8bit(params, **OPTIONS, stochastic_rounding=True, **options, backend=backend)

    return (
        Kind("stochastic", BF16, 14, 2, adamw("stochastic"), 1.5),
        Kind("fp32", FP32, 28, 4, adamw("fp32"), 1.2),
        Kind("master", BF16, 28, 2, adamw("master")),
        Kind("kahan", BF16, 18, 2, adamw("kahan")),
        Kind("stochastic, fp32 moments", BF16, 22, 2, adamw("stochastic", state_dtype=FP32)),
        # codes and scales read and written: 2 · 2 · (1 + 4/256)
        Kind("8-bit, stochastic", BF16, 6 + 4 * (1 + 4 / 256), 2, eight),
    )


def shapes(total: int) -> list[int]:
    """About 300 tensors, as a language model's: the embedding, matrices of its layers, many vectors."""
    vectors, matrices = (187, 112) if total > 10_000_000 else (20, 10)
    vector = max(1, min(2048, total // 1000))
    embedding = total // 5
    matrix = (total - embedding - vectors * vector) // matrices // 16 * 16
    return [embedding // 16 * 16, *[matrix] * matrices, *[vector] * vectors]


def run(machine: Machine, record: Record) -> None:
    """Part adamw."""
    bandwidth = copy_bandwidth(machine, record)
    for total in machine.pick((1_000_000_000, 100_000_000), (1_000_000_000,), (20_000,)):
        for kind in kinds(machine.optimizer_backend):
            with record.attempt(f"{kind.name}, {total:,} parameters", needs=4):
                _kind(machine, record, kind, total, bandwidth)
            if machine.device.type == "cuda":
                torch.cuda.empty_cache()


def copy_bandwidth(machine: Machine, record: Record) -> float:
    """Bytes read and written per second by a copy within the device, at best."""
    size = machine.pick(1 << 30, 1 << 30, 1 << 12)
    source, target = (torch.zeros(size, dtype=torch.int32, device=machine.device) for _ in range(2))
    found = interleaved(machine, record, "copy of 4 GiB", {"copy_": lambda: target.copy_(source)}, 9)
    bandwidth = 2 * source.nbytes / (found["copy_"].least * 1e-3)
    record.row("copy of 4 GiB", "read and written", bandwidth / 1e12, "TB/s")
    return bandwidth


def _kind(machine: Machine, record: Record, kind: Kind, total: int, bandwidth: float) -> None:
    params = [
        nn.Parameter((torch.randn(size, device=machine.device) * 0.02).to(kind.dtype))
        for size in shapes(total)
    ]
    for param in params:
        param.grad = (torch.randn(param.shape, device=machine.device) * 1e-4).to(kind.dtype)
    count = sum(param.numel() for param in params)
    case = f"{kind.name}, {count / 1e6:,.0f} M parameters in {len(params)} tensors"
    # a norm that clips nothing: clip_grad_norm_ would shrink the gradients again at every step
    ours, clipped = kind.make(params), kind.make(params, max_norm=1e6)
    calls: dict[str, Callable[[], object]] = {"tunesmith": ours.step, CLIPPED: clipped.step}
    calls |= _peers(machine, record, kind, params)
    found = interleaved(machine, record, case, calls, machine.pick(11, 5, 2))
    for name, floor in (("tunesmith", kind.floor), (CLIPPED, kind.floor + kind.gradient)):
        if name in found:
            share = floor * count / (found[name].median * 1e-3) / bandwidth
            # below some 100 M parameters, launches and the host weigh, and the states fit the cache in part
            limit = ">= 0.9" if count > 5e8 else None
            record.row(
                case, f"{name}: share of the copy's bandwidth on {floor:.1f} B/parameter", share, "", limit
            )
    for name in (CLIPPED, FUSED):
        if name in found:
            times = sorted(machine.host_time(calls[name]) for _ in range(5))
            record.row(case, f"{name}: time of the host", times[2], "ms", least=times[0])
    limit = None if kind.least is None or count < 5e8 else f">= {kind.least}"
    ratio(record, case, found, FUSED, CLIPPED, limit)
    ratio(record, case, found, CLIPPED, "tunesmith")
    for name in [name for name in found if name not in (FUSED, CLIPPED, "tunesmith")]:
        ratio(record, case, found, name, CLIPPED if name.startswith("clip") else "tunesmith")


def _peers(
    machine: Machine, record: Record, kind: Kind, params: list[nn.Parameter]
) -> dict[str, Callable[[], object]]:
    def clip_and(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
        def call() -> None:
            nn.utils.clip_grad_norm_(params, 1e6)
            optimizer.step()

        return call

    if kind.name.startswith("8-bit"):
        calls: dict[str, Callable[[], object]] = {}
        for package, options in (("bitsandbytes", {}), ("torchao", {"bf16_stochastic_round": True})):
            if optim := _module(machine, record, package):
                calls[f"{package} AdamW8bit"] = optim.AdamW8bit(params, **OPTIONS, **options).step
        return calls
    # torch has no master weights, stochastic rounding or Kahan sums: its bf16 step has bf16 moments
    fused = torch.optim.AdamW(params, **OPTIONS, fused=True)
    calls = {FUSED: clip_and(fused)}
    if kind.name in ("fp32", "stochastic"):
        calls["torch fused"] = fused.step
        calls["clip_grad_norm_ + torch foreach"] = clip_and(
            torch.optim.AdamW(params, **OPTIONS, foreach=True)
        )
    if kind.name == "stochastic" and (optim := _module(machine, record, "torchao")):
        calls["torchao _AdamW, stochastic rounding"] = optim._AdamW(
            params, **OPTIONS, bf16_stochastic_round=True
        ).step
    return calls


def _module(machine: Machine, record: Record, package: str) -> Any:
    """`package.optim`, or None and a note."""
    if importlib.util.find_spec(package) is None:
        record.note(f"{package}: not installed")
        return None
    if machine.dry:
        record.note(f"{package}: wants a GPU")
        return None
    with record.attempt(f"import of {package}"):
        return importlib.import_module(f"{package}.optim")
    return None
