"""Linear cross-entropy on the CPU, forward and backward: ours beside the bare products, the whole logits,
torch.compile and torch's own F.linear_cross_entropy. Interleaved rounds, the least time of each, as ratios.

    python bench/kernels_linear_cross_entropy.py [--rows 2048] [--hidden 1024] [--vocab 50304] [--rounds 7]

The peak is what a process of its own takes beyond its inputs. Threads spin at each other where the cores are shared:
OMP_NUM_THREADS at most the free ones; where none is free, OMP_NUM_THREADS=1 and --cpu-time."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tunesmith_kernels import linear_cross_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IGNORED = -100
CHUNK = 512


@dataclass(frozen=True)
class Shape:
    rows: int
    hidden: int
    vocab: int


@dataclass(frozen=True)
class Row:
    """seconds: the least of the rounds. products: its time over that of the three products of all rows. naive: the
    whole logits' time over its own. peak: MiB beyond the inputs."""

    case: str
    name: str
    seconds: float
    products: float
    naive: float
    peak: float | None


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    target: Tensor

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, masked: float) -> Inputs:
        torch.manual_seed(0)
        hidden = torch.randn(shape.rows, shape.hidden).to(dtype).requires_grad_()
        weight = (torch.randn(shape.vocab, shape.hidden) * 0.02).to(dtype).requires_grad_()
        target = torch.randint(0, shape.vocab, (shape.rows,))
        target[torch.arange(shape.rows) < masked * shape.rows] = IGNORED
        return cls(hidden, weight, target)


def products(inputs: Inputs) -> None:
    """The three products alone, in chunks, into buffers that are there: what no way of computing can spare."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = _buffer(CHUNK, weight.shape[0], hidden.dtype)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    for start in range(0, hidden.shape[0], CHUNK):
        rows = hidden[start : start + CHUNK]
        out = logits[: rows.shape[0]]
        torch.mm(rows, weight.t(), out=out)
        torch.mm(out, weight, out=d_hidden[start : start + CHUNK])
        if start:
            d_weight.addmm_(out.t(), rows)
        else:
            torch.mm(out.t(), rows, out=d_weight)


@cache
def _buffer(rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, vocab), 1e-3, dtype=dtype)


def ours(inputs: Inputs) -> None:
    count = (inputs.target != IGNORED).sum()
    linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target, normalizer=count).backward()


def _loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def naive(inputs: Inputs) -> None:
    _loss(inputs.hidden, inputs.weight, inputs.target).backward()


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_loss, dynamic=False)


def compiled(inputs: Inputs) -> None:
    _compiled()(inputs.hidden, inputs.weight, inputs.target).backward()


def torchs(inputs: Inputs) -> None:
    """With options, without which it makes the whole logits: those that it chooses."""
    options: Any = torch.nn.LinearCrossEntropyOptions()
    F.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target, options=options).backward()


CONTENDERS: dict[str, Callable[[Inputs], None]] = {
    "three products": products,
    "tunesmith": ours,
    "whole logits": naive,
    "torch.compile": compiled,
    "F.linear_cross_entropy": torchs,
}


def rows(
    shape: Shape,
    rounds: int,
    masked: tuple[float, ...] = (0.0, 1 / 7, 0.5, 0.85),
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Row]:
    """Every contender at every share of ignored rows, with peaks where none are ignored."""
    for kind, dtype in DTYPES.items():
        for share in masked:
            inputs = Inputs.make(shape, dtype, share)
            names = list(CONTENDERS) if share == 0 else ["three products", "tunesmith", "whole logits"]
            least = _least(inputs, names, rounds, clock)
            peaks = {name: _peak(name, shape, kind) for name in names} if share == 0 else {}
            case = f"{kind}, {share:.0%} of the rows ignored"
            for name in names:
                times, speed = least[name] / least["three products"], least["whole logits"] / least[name]
                yield Row(case, name, least[name], times, speed, peaks.get(name))


def _least(inputs: Inputs, names: list[str], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    least = dict.fromkeys(names, float("inf"))
    for number in range(rounds + 1):  # the first warms up, and compiles
        for name in names:
            start = clock()
            CONTENDERS[name](inputs)
            if number:
                least[name] = min(least[name], clock() - start)
            inputs.hidden.grad = inputs.weight.grad = None
    return least


def _peak(name: str, shape: Shape, kind: str) -> float:
    asked = [name, *map(str, (shape.rows, shape.hidden, shape.vocab)), kind]
    done = subprocess.run(
        [sys.executable, __file__, "--peak-of", *asked], capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def _print_peak(name: str, *asked: str) -> None:
    """Of the second call: the first loads, builds and compiles what stays."""
    small = Inputs.make(Shape(64, int(asked[1]), 128), DTYPES[asked[3]], 0.0)
    shape = Shape(*map(int, asked[:3]))
    inputs = Inputs.make(shape, DTYPES[asked[3]], 0.0)
    CONTENDERS[name](inputs if name == "torch.compile" else small)
    inputs.hidden.grad = inputs.weight.grad = None
    _buffer.cache_clear()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = _resident()
    CONTENDERS[name](inputs)
    print((_high_water() - before) / 1024)


def _high_water() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _resident() -> int:
    return _status("VmRSS")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) for line in file if line.startswith(key)), 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("rows", 2048), ("hidden", 1024), ("vocab", 50304), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cpu-time", action="store_true", help="of this process, not the wall clock's")
    parser.add_argument("--peak-of", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if args.peak_of:
        _print_peak(*args.peak_of)
        return
    shape = Shape(args.rows, args.hidden, args.vocab)
    print(f"linear cross-entropy, {shape}, {torch.get_num_threads()} threads")
    case = None
    for row in rows(shape, args.rounds, clock=time.process_time if args.cpu_time else time.perf_counter):
        if row.case != case:
            case = row.case
            print(f"{case}\n{'':26s}{'s':>8}{'× products':>12}{'naive ÷':>9}{'peak MiB':>10}")
        peak = "" if row.peak is None else f"{row.peak:10.0f}"
        print(f"  {row.name:24s}{row.seconds:8.3f}{row.products:12.2f}{row.naive:9.2f}{peak}", flush=True)


if __name__ == "__main__":
    main()
