"""NVIDIA's compute-sanitizer over one small call of every Triton kernel: accesses out of bounds or misaligned
(memcheck), and races in shared memory (racecheck)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import distillation_cases
import head_cases
from gpu.device import Machine, moved
from gpu.record import Record
from tunesmith_kernels.adamw import AdamW
from tunesmith_kernels.adamw8bit import AdamW8bit

TOOLS = ("memcheck", "racecheck")
SECONDS = 90
_FOUND = 77  # the exit code that is asked for where the sanitizer finds something
_SCRIPT = Path(__file__).resolve().parents[1] / "gpu_check.py"
_USUAL = "/usr/local/cuda/bin/compute-sanitizer"


def run(machine: Machine, record: Record) -> None:
    """Part sanitizer: in processes of its own."""
    command = [sys.executable, str(_SCRIPT), "--exercise", *(["--dry"] if machine.dry else [])]
    with record.attempt(
        "without the sanitizer", needs=5
    ):  # compiles, so that the sanitizer need not watch it
        subprocess.run(command, check=True, capture_output=True, timeout=max(record.remaining(), 1))
        record.note("every kernel ran without the sanitizer")
    binary = shutil.which("compute-sanitizer") or (_USUAL if Path(_USUAL).exists() else None)
    if binary is None or machine.dry:
        record.note(
            "compute-sanitizer: not installed" if binary is None else "compute-sanitizer: wants a GPU"
        )
        return
    # every tensor its own allocation, so that an access beyond it is seen
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in TOOLS:
        with record.attempt(tool, needs=10):
            _run(
                record, tool, [binary, "--tool", tool, "--error-exitcode", str(_FOUND), *command], environment
            )


def _run(record: Record, tool: str, command: list[str], environment: dict[str, str]) -> None:
    limit = min(SECONDS, record.remaining())
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        record.fail(f"{tool}: not done after {limit:.0f} s")
        return
    lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), "no summary").strip("= ")
    if done.returncode == 0 and "no summary" not in summary:
        record.note(f"{tool}: {summary}")
    else:
        shown = " | ".join(line.strip("= ") for line in lines[:6]) or done.stderr[-400:]
        record.fail(f"{tool}: exit {done.returncode}: {summary}: {shown}")


def exercise(machine: Machine) -> None:
    """Every kernel once, on shapes that end within a block."""
    for dtype, vocab in ((torch.bfloat16, 1003), (torch.float32, 512)):
        for options in ({}, {"label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.01}):
            made = head_cases.case(37, 32, vocab, ignored=0.2).given(**options)
            head_cases.fused(moved(made.to(dtype), machine.device), machine.loss_backend)
        soft = torch.softmax(torch.randn(37, vocab), 1)
        made = replace(head_cases.case(37, 32, vocab), target=soft)
        head_cases.fused(moved(made.to(dtype), machine.device), machine.loss_backend)
    for divergence in distillation_cases.DIVERGENCES.values():
        for teacher in distillation_cases.TEACHERS:
            made = distillation_cases.case(37, 32, 301, teacher=teacher, **divergence).to(torch.bfloat16)
            distillation_cases.distilled(moved(made, machine.device), machine.loss_backend)
    sizes = (1, 17, 4096, 8192, 20_011)
    for precision in ("master", "stochastic", "kahan"):
        params = _params(machine, sizes)
        _step(AdamW(params, precision=precision, max_norm=1.0, backend=machine.optimizer_backend), params)
    params = [nn.Parameter(param.detach().float()) for param in _params(machine, sizes)]
    _step(AdamW(params, max_norm=1.0, backend=machine.optimizer_backend), params)
    params = _params(machine, sizes)
    _step(AdamW8bit(params, stochastic_rounding=True, backend=machine.optimizer_backend), params)
    machine.synchronize()


def _params(machine: Machine, sizes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(size, device=machine.device).to(torch.bfloat16)) for size in sizes]


def _step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
