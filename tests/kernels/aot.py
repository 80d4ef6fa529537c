"""Triton kernels compiled to machine code for a GPU that is not here."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)
# what a block can have: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Compiled:
    """A kernel for one GPU. shared_bytes: of a block; registers: of a thread; the spills in bytes of a thread."""

    ptx: str
    cubin: bytes
    shared_bytes: int
    registers: int
    spill_stores: int
    spill_loads: int


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    capability: int,
    divisible_by_16: tuple[str, ...] = (),
) -> Compiled:
    """Compiles a `@triton.jit` function with triton's own ptxas, in a cache folder of its own.

    signature: the type of every argument that is not constexpr ("*fp32", "*i64", "i32", …); constexprs: the values
    of the others. capability: 80, 90 or 100. divisible_by_16: the arguments that triton's launcher would find to be
    multiples of 16 (tensors of their own nearly always are), which it then compiles for.

    Needs a process in which TRITON_INTERPRET was not set when triton was imported.
    """
    assert isinstance(fn, triton.runtime.JITFunction), "triton was imported with TRITON_INTERPRET set"
    types = {name: "constexpr" if name in constexprs else signature[name] for name in fn.arg_names}
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible_by_16}
    source = ASTSource(fn, signature=types, constexprs=dict(constexprs), attrs=attributes)
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),  # where triton prints what `ptxas -v` said
    ):
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
        ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
    return Compiled(
        ptx=ptx,
        cubin=cubin,
        shared_bytes=kernel.metadata.shared,
        registers=_number(r"Used (\d+) registers", log.getvalue()),
        spill_stores=_number(r"(\d+) bytes spill stores", log.getvalue()),
        spill_loads=_number(r"(\d+) bytes spill loads", log.getvalue()),
    )


def _number(pattern: str, log: str) -> int:
    found = re.findall(pattern, log)
    assert len(found) == 1, f"{pattern!r} is {len(found)} times in what ptxas said:\n{log}"
    return int(found[0])


def assert_fits(kernel: Compiled, capability: int, spills: int = 0) -> None:
    """That the kernel was built, fits into the GPU's shared memory, and spills at most `spills` bytes."""
    assert kernel.cubin
    assert kernel.shared_bytes <= SHARED_BYTES[capability]
    assert max(kernel.spill_stores, kernel.spill_loads) <= spills
