"""AdamW's Triton kernels as machine code for GPUs that are not here: they build, fit, spill nothing, and read and write
whole vectors. And what stands in the way of Triton on a machine is said."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import adamw_triton_runs as runs
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


class _GPU:
    """What triton's launcher asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class _NoReads(TorchDispatchMode):
    """Refuses the operators that would wait for a GPU to read a number of its memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in {"_local_scalar_dense", "equal", "nonzero", "is_nonzero"}
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The compiled kernel of every launch, which ends before the GPU would be needed."""
    kernels: list[Any] = []

    def compiled(kernel: Any, programs: int, device: torch.device, *arguments: Any, **options: Any) -> None:
        assert programs > 0
        kernels.append(kernel.warmup(*arguments, grid=(programs,), **options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", _GPU())
    monkeypatch.setattr(triton_support, "launch", compiled)
    return kernels


def test_a_step_is_launched_without_reading_and_compiled_once(launched: list[Any]) -> None:
    """As triton's launcher specialises it: nothing is compiled again for other numbers, sizes or seeds."""
    kernels: dict[str, set[str]] = {}
    for kind, settings in runs.KINDS.items():
        several = (runs.Entry(70000, stream=1, offset=1 << 40), runs.Entry(13, stream=16, shift=1))
        for seed, entries in ((0, (runs.Entry(1),)), (1, several), (16 << 32, several), (1 << 63, several)):
            case = runs.Case(((settings, entries),), seed=seed)
            tensors = runs.build(case)
            groups = [group for update in (0, 1) for group in runs.groups_of(case, tensors, update)]
            for group in groups:
                launched.clear()
                with _NoReads():
                    norm = triton_step.norm(group.grads)
                    coefficient, skip = triton_step.clip(norm, 1.0)
                    triton_step.update([group], coefficient, skip, seed)
                assert len(launched) == 4
                for kernel in launched:
                    name = kernel.src.fn.__name__
                    own = kind if kernel.src.fn is triton_kernels.update_chunks else ""
                    kernels.setdefault(f"{name} {own}", set()).add(kernel.hash)
    assert {name: len(hashes) for name, hashes in kernels.items()} == dict.fromkeys(kernels, 1)
    assert len(kernels) == 3 + len(KINDS)


def test_tables_are_kept_while_the_tensors_stay(launched: list[Any]) -> None:
    case = runs.Case(((runs.KINDS["fp32"], (runs.Entry(30000), runs.Entry(5, stream=1))),))
    tensors = runs.build(case)
    one = torch.tensor(1.0)
    tables = (triton_step._integers, triton_step._chunk_table, triton_step._arrived)

    def misses(update: int) -> list[int]:
        before = [table.cache_info().misses for table in tables]
        triton_step.update(runs.groups_of(case, tensors, update), one, one, 0)
        return [table.cache_info().misses - was for table, was in zip(tables, before, strict=True)]

    assert misses(0) == [1, 1, 1]
    assert misses(0) == [0, 0, 0]
    assert misses(1) == [1, 0, 1]  # other gradients
    tensors.params[0] = tensors.params[0].clone()
    assert misses(1) == [1, 0, 1]


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
