"""One step of 8-bit AdamW on the CPU: ours beside bitsandbytes', torch's fused fp32 AdamW and, where it is installed,
torchao's; interleaved rounds, the least time of each, and its ratio to ours.

    python bench/kernels_adamw8bit.py [--numel 20_000_000] [--rounds 5] [--dtype float32]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
from collections.abc import Callable

import torch
from torch.optim import Optimizer

from tunesmith_kernels.adamw8bit import AdamW8bit, path_for


def _contenders() -> dict[str, Callable[[list[torch.nn.Parameter]], Optimizer]]:
    found: dict[str, Callable[[list[torch.nn.Parameter]], Optimizer]] = {
        "tunesmith AdamW8bit": AdamW8bit,
        "tunesmith AdamW8bit, stochastic rounding": lambda params: AdamW8bit(
            params, stochastic_rounding=True
        ),
        "tunesmith AdamW8bit, max_norm": lambda params: AdamW8bit(params, max_norm=1.0),
        "torch AdamW(fused=True)": lambda params: torch.optim.AdamW(params, fused=True),
    }
    for name in ("bitsandbytes", "torchao"):
        if importlib.util.find_spec(name):
            found[f"{name} AdamW8bit"] = importlib.import_module(f"{name}.optim").AdamW8bit
    return found


def _made(make: Callable[[list[torch.nn.Parameter]], Optimizer], numel: int, dtype: torch.dtype) -> Optimizer:
    generator = torch.Generator().manual_seed(0)
    shapes = [(numel // 1024, 256)] * 4  # torchao keeps codes of whole blocks alone
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = (1e-3 * torch.randn(param.shape, generator=generator)).to(dtype)
    return make(params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    optimizers = {
        name: _made(make, args.numel, getattr(torch, args.dtype)) for name, make in _contenders().items()
    }
    least = dict.fromkeys(optimizers, float("inf"))
    for _ in range(args.rounds + 1):  # the first makes states and compiles
        for name, optimizer in optimizers.items():
            for turn in range(1 if name.startswith(("bitsandbytes", "torchao")) else 4):
                start = time.perf_counter()
                optimizer.step()
                seconds = time.perf_counter() - start
                if turn or name.startswith(("bitsandbytes", "torchao")):
                    least[name] = min(least[name], seconds)
    print(f"{args.numel:,} {args.dtype} parameters, {torch.get_num_threads()} threads, {path_for('cpu')[1]}")
    ours = least["tunesmith AdamW8bit"]
    for name, seconds in least.items():
        per_100m = seconds * 1e8 / args.numel * 1e3
        print(f"{name:42s} {per_100m:9.1f} ms per 100 M   {seconds / ours:6.2f} x")


if __name__ == "__main__":
    main()
