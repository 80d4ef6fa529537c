"""The program that runs the cases of test_adamw8bit_paths in triton's interpreter: it wants a process of its own,
since triton reads TRITON_INTERPRET when a kernel is defined.

    TRITON_INTERPRET=1 python adamw8bit_triton_runs.py OUT.pt
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamw8bit_cases import CASES, CPU, run
from tunesmith_kernels import triton_support
from tunesmith_kernels.adamw8bit import triton_step
from tunesmith_kernels.adamw8bit.codebook import Codebook, standard_books
from tunesmith_kernels.adamw8bit.triton_kernels import _encoded  # pyright: ignore[reportPrivateUsage]


@triton.jit
def encode(numbers, bounds, codes, signed: tl.constexpr, block_size: tl.constexpr):
    index = tl.program_id(0) * block_size + tl.arange(0, block_size)
    found, _ = _encoded(tl.load(numbers + index), bounds, signed, 1, block_size)
    tl.store(codes + index, found)


def codes_of(book: Codebook) -> tuple[Tensor, Tensor]:
    """Every bound of the book and its neighbours, in blocks of 1024 that begin with 1, and their codes."""
    bounds, infinity = book.bounds[1:-1], torch.tensor(float("inf"))
    near = torch.cat(
        [bounds, torch.nextafter(bounds, infinity), torch.nextafter(bounds, -infinity), book.values]
    )
    near = near[near.abs() <= 1] if book.signed else near.clamp(0, 1)
    numbers = torch.ones(2, 1024)
    numbers[0, 1 : 1 + len(near) // 2] = near[: len(near) // 2]
    numbers[1, 1 : 1 + len(near) - len(near) // 2] = near[len(near) // 2 :]
    numbers = numbers.flatten()
    codes = torch.empty(2048, dtype=torch.uint8)
    encode[(2,)](numbers, book.bounds, codes, signed=book.signed, block_size=1024)
    return numbers, codes


def main(out: str) -> None:
    launch, counted = triton_support.launch, [0]

    def counting(*args: Any, **kwargs: Any) -> None:
        counted[0] += 1
        launch(*args, **kwargs)

    triton_support.launch = counting
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        launches: list[int] = []

        def update(*args: Any, launches: list[int] = launches) -> None:
            counted[0] = 0
            triton_step.update(*args)
            launches.append(counted[0])

        found[name] = run(case, update), launches
    found["skipped"] = run(CASES["fp32"], triton_step.update, skip=float("nan"))
    books = standard_books(CPU)
    found["codes"] = {"signed": codes_of(books.signed), "unsigned": codes_of(books.unsigned)}
    torch.save(found, out)


if __name__ == "__main__":
    main(sys.argv[1])
