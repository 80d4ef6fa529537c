"""AdamW's Triton kernels as machine code for GPUs that are not here: they build, fit, spill nothing, and read and write
whole vectors. And what stands in the way of Triton on a machine is said."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton.language as tl

from aot import CAPABILITIES, Compiled, assert_fits, compile_kernel
from tunesmith_kernels import triton_support
from tunesmith_kernels.adamw import triton_kernels, triton_step

KINDS = {
    "fp32": ("fp32", tl.float32),
    "master": ("master", tl.float32),
    "stochastic": ("stochastic", tl.uint16),
    "stochastic, fp32 moments": ("stochastic", tl.float32),
    "kahan": ("kahan", tl.uint16),
}


def update_kernel(kind: str, capability: int) -> Compiled:
    precision, state = KINDS[kind]
    config = triton_step.UPDATE
    pointers = {
        "table": "*i64",
        "groups": "*fp32",
        "chunks": "*i64",
        "arrived": "*i32",
        "coefficient": "*fp32",
        "skip": "*fp32",
    }
    return compile_kernel(
        triton_kernels.update_chunks,
        {**pointers, "seed_low": "i32", "seed_high": "i32"},
        {"precision": precision, "state": state, "chunk_size": config.chunk_size, "block": config.block},
        num_warps=config.num_warps,
        num_stages=1,
        capability=capability,
        divisible_by_16=tuple(pointers),
    )


def accesses(kernel: Compiled, kind: str) -> list[int]:
    """The bytes of each access of the kind (ld or st) to global memory by a vector."""
    found = re.findall(rf"\b{kind}\.global(?:\.\w+)*?\.v(\d)\.b(\d+)", kernel.ptx)
    return [int(width) * int(bits) // 8 for width, bits in found]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_update(kind: str, capability: int) -> None:
    kernel = update_kernel(kind, capability)
    assert_fits(kernel, capability)
    assert ".f64" not in kernel.ptx
    config = triton_step.UPDATE
    each = config.block // (32 * config.num_warps)  # elements of a thread
    precision, state = KINDS[kind]
    plain, moment = (4 if precision == "fp32" else 2), (4 if state == tl.float32 else 2)
    # master reads no parameter and writes two; kahan reads and writes what it left out
    read = each * (plain * (2 if precision != "master" else 1) + 2 * moment)
    written = each * (plain + 2 * moment)
    extra = each * {"master": 4, "kahan": 2}.get(precision, 0)
    assert sum(accesses(kernel, "ld")) == read + extra
    assert sum(accesses(kernel, "st")) == written + extra
    # beside fp32, bfloat16 goes 4 elements at a time
    assert min(accesses(kernel, "ld") + accesses(kernel, "st")) == (16 if plain == moment else 8)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_norm(capability: int) -> None:
    config = triton_step.NORM
    squares = compile_kernel(
        triton_kernels.sum_squares,
        {"table": "*i64", "chunks": "*i64", "partial": "*fp32"},
        {"chunk_size": config.chunk_size, "block": config.block},
        num_warps=config.num_warps,
        num_stages=1,
        capability=capability,
        divisible_by_16=("table", "chunks", "partial"),
    )
    assert_fits(squares, capability)
    assert ".f64" not in squares.ptx
    each = config.block // (32 * config.num_warps)
    assert sorted(accesses(squares, "ld")) == [16] * (each * (2 + 4) // 16)  # a branch per dtype
    finish = compile_kernel(
        triton_kernels.finish_norm,
        {"partial": "*fp32", "norm": "*fp32", "count": "i32"},
        {"block": triton_step.FINISH_BLOCK},
        num_warps=triton_step.FINISH_WARPS,
        num_stages=1,
        capability=capability,
        divisible_by_16=("partial", "norm"),
    )
    assert_fits(finish, capability)
    assert "sqrt.rn.f64" in finish.ptx
    pointers = {"norm": "*fp32", "max_norm": "*fp32", "coefficient": "*fp32", "skip": "*fp32"}
    clip = compile_kernel(triton_kernels.clip_scale, pointers, {}, 1, 1, capability, tuple(pointers))
    assert_fits(clip, capability)
    assert ".f64" not in clip.ptx


def test_the_helper_sees_spills() -> None:
    """A block far too large for its threads' registers."""
    config = triton_step.NORM
    kernel = compile_kernel(
        triton_kernels.sum_squares,
        {"table": "*i64", "chunks": "*i64", "partial": "*fp32"},
        {"chunk_size": config.chunk_size, "block": 4096},
        num_warps=1,
        num_stages=1,
        capability=90,
    )
    assert kernel.spill_stores > 0
    with pytest.raises(AssertionError):
        assert_fits(kernel, 90)


def test_what_stands_in_the_way_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)

    def has(capability: tuple[int, int]) -> None:
        def answer(device: Any) -> tuple[int, int]:
            return capability

        monkeypatch.setattr(torch.cuda, "get_device_capability", answer)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    has((9, 0))
    assert triton_support.why_not(gpu) is None
    assert "CPU" in str(triton_support.why_not(cpu))
    assert "mps" in str(triton_support.why_not(torch.device("mps")))
    has((7, 5))
    assert "7.5" in str(triton_support.why_not(gpu))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_support.why_not(cpu) is None
    assert "TRITON_INTERPRET" in str(triton_support.why_not(gpu))


def test_without_triton_its_absence_is_the_reason() -> None:
    program = (
        "import importlib.util as util, sys\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, package=None: None if name == 'triton' else find(name, package)\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from tunesmith_kernels import triton_support\n"
        "print(triton_support.why_not(torch.device('cuda', 0)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("triton is not installed")


@pytest.mark.parametrize(
    ("number", "low"), [(0, 0), (5, 5), (-1, -1), (1 << 31, -(1 << 31)), (0xFFFFFFFF, -1), (7 << 32 | 3, 3)]
)
def test_signed32(number: int, low: int) -> None:
    assert triton_support.signed32(number) == low
