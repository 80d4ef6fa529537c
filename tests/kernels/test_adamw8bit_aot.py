"""The Triton kernel of 8-bit AdamW compiled for GPUs that are not here: it fits, spills nothing, and computes in
fp32."""

from __future__ import annotations

import re

import pytest

from aot import CAPABILITIES, Compiled, assert_fits, compile_kernel
from tunesmith_kernels.adamw8bit import triton_kernels, triton_step

POINTERS = {
    "table": "*i64",
    "groups": "*fp32",
    "chunks": "*i64",
    "arrived": "*i32",
    "values1": "*fp32",
    "bounds1": "*fp32",
    "values2": "*fp32",
    "bounds2": "*fp32",
}
SIGNATURE = POINTERS | {"coefficient": "*fp32", "skip": "*fp32", "seed_low": "i32", "seed_high": "i32"}
KINDS = [(rounding, encoded) for rounding in ("none", "nearest", "stochastic") for encoded in (True, False)]


def compiled(rounding: str, encoded: bool, block_size: int, capability: int) -> Compiled:
    launched = triton_step.config(block_size)
    return compile_kernel(
        triton_kernels.update_chunks,
        SIGNATURE,
        {
            "rounding": rounding,
            "encoded": encoded,
            "chunk_size": launched.chunk_size,
            "blocks": launched.blocks,
            "block_size": block_size,
        },
        num_warps=launched.num_warps,
        num_stages=1,
        capability=capability,
        divisible_by_16=tuple(POINTERS),
    )


def hold(kernel: Compiled, capability: int) -> None:
    assert_fits(kernel, capability, spills=16)
    assert kernel.shared_bytes <= 16 * 1024
    assert ".f64" not in kernel.ptx
    # 4 numbers at a time where all is aligned: param and grad, twice each, and the parameter's two stores
    assert len(re.findall(r"global\.v[24]\.b32", kernel.ptx)) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("rounding", "encoded"), KINDS)
def test_every_kind_compiles(rounding: str, encoded: bool, capability: int) -> None:
    hold(compiled(rounding, encoded, 256, capability), capability)


def test_the_default_compiles() -> None:
    hold(compiled("nearest", True, 256, 90), 90)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [64, 4096])
def test_other_blocks_compile(block_size: int) -> None:
    hold(compiled("stochastic", True, block_size, 90), 90)
