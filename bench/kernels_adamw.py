"""One step of AdamW with clipping on the CPU: ours beside torch's clip_grad_norm_ and fused AdamW, and DeepSpeed's
CPUAdam where asked for. Interleaved rounds, the least time of each, and torch's over it.

    python bench/kernels_adamw.py [--numel 100_000_000] [--rounds 20] [--deepspeed]

Threads spin at each other where the cores are shared: OMP_NUM_THREADS at most the free ones."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tunesmith_kernels.adamw import AdamW, Precision, path_for

_Step = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """ratio: torch's time over this one's; target: what it is to be at least, if there is a target."""

    case: str
    name: str
    seconds: float
    ratio: float
    target: float | None = None


@dataclass(frozen=True)
class _Contender:
    name: str
    make: Callable[[list[nn.Parameter]], _Step]
    target: float | None = None


def rows(rounds: int = 20, numel: int = 100_000_000, deepspeed: bool = False) -> list[Row]:
    """Measures every case. Takes about 40 bytes of memory per parameter."""
    extra = [_Contender("clip + DeepSpeedCPUAdam", partial(_deepspeed, clips=True))] if deepspeed else []
    extra_bare = [_Contender("DeepSpeedCPUAdam", partial(_deepspeed, clips=False))] if deepspeed else []
    fp32, bf16 = torch.float32, torch.bfloat16
    return [
        *_measured(
            "fp32, clipped",
            fp32,
            [_Contender("torch clip + fused", _torch_clipped), _ours("tunesmith", target=1.25), *extra],
            rounds,
            numel,
        ),
        *_measured(
            "fp32",
            fp32,
            [
                _Contender("torch fused", _torch),
                _ours("tunesmith", max_norm=None, target=1.0),
                *extra_bare,
            ],
            rounds,
            numel,
        ),
        *_measured(
            "bf16, clipped",
            bf16,
            [
                _Contender("torch clip + fused", _torch_clipped),
                _ours("tunesmith stochastic", "stochastic", target=1.6),
                _ours("tunesmith kahan", "kahan"),
            ],
            rounds,
            numel,
        ),
        *_measured(
            "bf16, clipped, fp32 states",
            bf16,
            [
                _Contender("torch clip + fused (bf16 states)", _torch_clipped),
                _ours("tunesmith stochastic", "stochastic", state_dtype=fp32),
                _ours("tunesmith master", "master"),
            ],
            rounds,
            numel,
        ),
    ]


def _ours(
    name: str,
    precision: Precision | None = None,
    max_norm: float | None = 1.0,
    state_dtype: torch.dtype | None = None,
    target: float | None = None,
) -> _Contender:
    def make(params: list[nn.Parameter]) -> _Step:
        return AdamW(params, precision=precision, max_norm=max_norm, state_dtype=state_dtype).step

    return _Contender(name, make, target)


def _torch(params: list[nn.Parameter]) -> _Step:
    return torch.optim.AdamW(params, fused=True).step


def _torch_clipped(params: list[nn.Parameter]) -> _Step:
    return _clipped(params, torch.optim.AdamW(params, fused=True).step)


def _deepspeed(params: list[nn.Parameter], clips: bool) -> _Step:
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # builds its op on first use

    step = DeepSpeedCPUAdam(params, adamw_mode=True).step
    return _clipped(params, step) if clips else step


def _clipped(params: list[nn.Parameter], step: _Step) -> _Step:
    def run() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        step()

    return run


def _measured(
    case: str, dtype: torch.dtype, contenders: Sequence[_Contender], rounds: int, numel: int
) -> list[Row]:
    """Each contender has tensors of its own; the first one is what the ratios refer to."""
    steps = [contender.make(_parameters(numel, dtype)) for contender in contenders]
    least = [float("inf")] * len(steps)
    for round_number in range(rounds + 1):  # the first makes the states
        for index, step in enumerate(steps):
            start = time.perf_counter()
            step()
            if round_number:
                least[index] = min(least[index], time.perf_counter() - start)
    del steps
    gc.collect()
    return [
        Row(case, contender.name, seconds, least[0] / seconds, contender.target)
        for contender, seconds in zip(contenders, least, strict=True)
    ]


def _parameters(numel: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """With gradients, of a norm above 1. An embedding and 12 transformer blocks of 12 tensors, `numel` elements in
    all (within 1 %)."""
    width = round((numel / 172) ** 0.5)
    block = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)] + [(width,)] * 6
    shapes = [(28 * width, width), *block * 12]
    params: list[nn.Parameter] = []
    for shape in shapes:
        param = nn.Parameter((0.02 * torch.randn(shape)).to(dtype))
        param.grad = (1e-3 * torch.randn(shape)).to(dtype)
        params.append(param)
    return params


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numel", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--deepspeed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"AdamW, {args.numel:,} parameters, {torch.get_num_threads()} threads; here: {path_for('cpu')[1]}")
    case = None
    for row in rows(args.rounds, args.numel, args.deepspeed):
        if row.case != case:
            case = row.case
            print(case)
        target = f"   (target {row.target:.2f} x)" if row.target else ""
        print(f"  {row.name:34s} {row.seconds * 1e3:8.1f} ms   {row.ratio:5.2f} x{target}")


if __name__ == "__main__":
    main()
