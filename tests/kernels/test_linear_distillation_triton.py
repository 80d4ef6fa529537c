"""The distillation's Triton kernels: in triton's interpreter against fp64 and torch's own error; compiled for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accuracy import hold
from aot import CAPABILITIES, assert_fits, compile_kernel
from distillation_cases import naive, owns, wrong_options
from distillation_triton_runs import cases, upstream
from tunesmith_kernels.linear_loss import triton_distillation as kernels

CASES = {name: (made, alike) for name, made, alike in cases()}
OUTPUTS = ("loss_out", "kd_out", "log_prob_out", "entropy_out")
# bytes: for sm_90 ptxas spills a register or two of its own accord, where it uses a quarter of those that it may
SPILLS = 8
NUMBERS = ("beta", "temperature", "kd_weight", "ce_weight", "softcap", "scale")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What the kernels computed, all cases in one process of its own."""
    out = tmp_path_factory.mktemp("distillation") / "found.pt"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("distillation_triton_runs.py")), str(out)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_as_near_as_torch(name: str, found: dict[str, dict[str, Tensor]]) -> None:
    made, alike = CASES[name]
    given = upstream(made)
    exact = naive(made.to(torch.float64), given)
    own = owns(made, exact, given)
    wrong = {} if alike else wrong_options(made)
    mutants = {
        mistake: naive(made.to(torch.float64).given(**options), given) for mistake, options in wrong.items()
    }
    for what, value in found[name].items():
        dropped = {mistake: mutant[what].to(value.dtype) for mistake, mutant in mutants.items()}
        if made.hidden.dtype != torch.float32:
            dropped.pop("β swapped", None)  # of so few rows 16 bits do not tell it
        hold(value, exact[what], own[what], f"{name}: {what}", **dropped)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("vocab", [203, 128_256])
@pytest.mark.parametrize("kind", [kernels.FORWARD_KL, kernels.REVERSE_KL, kernels.JSD])
@pytest.mark.parametrize("logits", ["*fp32", "*fp16", "*i16"])
def test_dense_kernel_compiles(logits: str, kind: int, vocab: int, capability: int) -> None:
    options = vocab == 203  # every option once, and none
    block, warps = kernels.block_size(vocab)
    constants = {"kind": kind, "warm": options, "capped": options, "scaled": options, "block": block}
    constants |= {"teacher_capped": options, "teacher_scaled": options, "interpreted": False}
    types = {"logits": logits, "teacher": "*fp32" if options else logits, **_common()}
    types |= {"teacher_softcap": "fp32", "teacher_scale": "fp32"}
    compiled = compile_kernel(kernels.dense_kernel, types, constants, warps, 3, capability, _aligned(vocab))
    assert_fits(compiled, capability, SPILLS)
    assert ".f64" not in compiled.ptx


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("few", [1, 64])
@pytest.mark.parametrize("kind", [kernels.FORWARD_KL, kernels.REVERSE_KL, kernels.JSD])
@pytest.mark.parametrize("logits", ["*fp32", "*fp16", "*i16"])
def test_top_k_kernel_compiles(logits: str, kind: int, few: int, capability: int) -> None:
    block, warps = kernels.block_size(50_304)
    constants = {"kind": kind, "warm": few == 64, "capped": few == 64, "scaled": few == 64, "block": block}
    constants |= {"tail": few != 1, "whole": few == 1, "few": few, "interpreted": False}
    types = {"logits": logits, "indices": "*i64", "log_probs": "*fp32", **_common()}
    types |= {"k": "i32", "tail_floor": "fp32"}
    compiled = compile_kernel(kernels.top_k_kernel, types, constants, warps, 3, capability, _aligned(50_304))
    assert_fits(compiled, capability, SPILLS)
    assert ".f64" not in compiled.ptx


def _common() -> dict[str, str]:
    return {
        "target": "*i64",
        "token_weight": "*fp32",
        "factor": "*fp32",
        **dict.fromkeys(OUTPUTS, "*fp32"),
        "agree_out": "*u8",
        "vocab": "i32",
        **dict.fromkeys(NUMBERS, "fp32"),
    }


def _aligned(vocab: int) -> tuple[str, ...]:
    return ("logits", "vocab") if vocab % 16 == 0 else ("logits",)
