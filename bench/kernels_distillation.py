"""Linear distillation on the CPU: the time of forward and backward beside the four bare products (student's logits,
both gradients, teacher's logits) and beside plain PyTorch; and the extra memory of each, at N and at 2N rows.

Everything is timed in this one process, in turns, so that the machine's mood falls on all alike: the ratios of the
minima count, not the seconds. Memory is measured each in a process of its own, as the growth of its greatest resident
set. Liger's fused JSD needs a GPU and so is not in this table.

    python bench/kernels_distillation.py [--rows 1024] [--vocab 50304] [--features 512] [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tunesmith_kernels.linear_loss.distillation import TeacherHidden, linear_distillation

WAYS: dict[str, dict[str, Any]] = {
    "forward_kl": {"divergence": "forward_kl"},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "beta": 0.5},
    "forward_kl T=2 + CE": {"divergence": "forward_kl", "temperature": 2.0, "ce_weight": 0.5},
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Inputs:
    """Student and teacher of one shape: hidden [rows, features], heads [vocab, features], targets [rows]."""

    def __init__(self, rows: int, features: int, vocab: int, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int, size: float = 1.0) -> Tensor:
            return (size * torch.randn(*shape, generator=random)).to(dtype)

        self.hidden = normal(rows, features).requires_grad_()
        self.weight = normal(vocab, features, size=features**-0.5).requires_grad_()
        self.teacher = TeacherHidden(normal(rows, features), normal(vocab, features, size=features**-0.5))
        self.target = torch.randint(vocab, (rows,), generator=random)


def fused(given: Inputs, options: dict[str, Any]) -> tuple[Tensor, ...]:
    loss = linear_distillation(given.hidden, given.weight, given.target, teacher=given.teacher, **options)
    return torch.autograd.grad(loss, (given.hidden, given.weight))


def naive(given: Inputs, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """The whole logits, torch's kl_div, autograd."""
    temperature = options.get("temperature", 1.0)
    z = F.linear(given.hidden, given.weight).float()
    with torch.no_grad():
        t = F.linear(given.teacher.hidden, given.teacher.weight).float()
        log_p = torch.log_softmax(t / temperature, 1)
    log_q = torch.log_softmax(z / temperature, 1)
    match options["divergence"]:
        case "forward_kl":
            kd = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        case "reverse_kl":
            kd = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
        case _:
            log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
            kd = 0.5 * F.kl_div(log_m, log_p, reduction="sum", log_target=True)
            kd = kd + 0.5 * F.kl_div(log_m, log_q, reduction="sum", log_target=True)
    loss = temperature**2 * kd
    if weight := options.get("ce_weight"):
        loss = loss + weight * F.cross_entropy(z, given.target, reduction="sum")
    return torch.autograd.grad(loss, (given.hidden, given.weight))


def products(given: Inputs, chunk: int = 512) -> None:
    """The four matrix products alone, in chunks of rows, into memory that is there."""
    x, w, teacher = given.hidden.detach(), given.weight.detach(), given.teacher
    logits, others = x.new_empty(2, min(chunk, len(x)), len(w))
    dx, dw = torch.empty_like(x), torch.zeros_like(w)
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        count = len(x[rows])
        torch.mm(x[rows], w.t(), out=logits[:count])
        torch.mm(teacher.hidden[rows], teacher.weight.t(), out=others[:count])
        torch.mm(logits[:count], w, out=dx[rows])
        dw.addmm_(logits[:count].t(), x[rows])


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_mib(arguments: argparse.Namespace, dtype: str, way: str, rows: int) -> float:
    """Extra memory of one forward and backward, in a process of its own."""
    shape = ["--rows", str(rows), "--features", str(arguments.features), "--vocab", str(arguments.vocab)]
    command = [sys.executable, __file__, *shape, "--threads", str(arguments.threads), "--memory", way, dtype]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report_memory(arguments: argparse.Namespace) -> None:
    way, dtype = arguments.memory
    # what the first call of the libraries takes is not the loss's
    small = Inputs(8, 16, 64, DTYPES[dtype])
    run = fused if way == "fused" else naive
    run(small, WAYS["forward_kl"])
    given = Inputs(arguments.rows, arguments.features, arguments.vocab, DTYPES[dtype])
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
    before = status_kib("VmRSS")
    gradients = run(given, WAYS["forward_kl"])
    print((status_kib("VmHWM") - before) / 1024)
    del gradients


def status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", nargs=2, metavar=("WAY", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        report_memory(arguments)
        return
    n, h, v = arguments.rows, arguments.features, arguments.vocab
    print(
        f"N {n}, H {h} (student and teacher), V {v}, {arguments.threads} threads; Liger's JSD is for GPUs alone"
    )
    for name, dtype in DTYPES.items():
        given = Inputs(n, h, v, dtype)
        runs: dict[str, Callable[[], object]] = {"products": lambda given=given: products(given)}
        for way, options in WAYS.items():
            runs[way] = lambda given=given, options=options: fused(given, options)
            runs[f"naive {way}"] = lambda given=given, options=options: naive(given, options)
        times = {
            run: min(column)
            for run, column in zip(
                runs,
                zip(
                    *([seconds(run) for run in runs.values()] for _ in range(arguments.rounds + 1)),
                    strict=True,
                ),
                strict=True,
            )
        }
        for way in WAYS:
            print(
                f"{name} {way:20s} {times[way] / times['products']:.2f} × the products, "
                f"{times[f'naive {way}'] / times[way]:.2f} × as fast as naive ({times[way] * 1000:.0f} ms)"
            )
        for kind in ("fused", "naive"):
            one, two = peak_mib(arguments, name, kind, n), peak_mib(arguments, name, kind, 2 * n)
            print(f"{name} {kind}: extra memory {one:.0f} MiB at {n} rows, {two:.0f} at {2 * n}")


if __name__ == "__main__":
    main()
