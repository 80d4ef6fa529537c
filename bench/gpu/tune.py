"""Other launch configurations of the AdamW update and of the cross-entropy's row kernel, timed beside the shipped ones:
what to write into their tables. Optional (`--tune`); it changes nothing."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gpu.device import Machine, interleaved, ratio
from gpu.ratios_adamw import kinds, shapes
from gpu.record import Record
from tunesmith_kernels.linear_loss.rows import RowInputs, RowOptions, RowOutputs

SHIPPED = "shipped"


def run(machine: Machine, record: Record) -> None:
    """Part tune."""
    if machine.dry:
        record.note("nothing to tune without Triton")
        return
    for kind in kinds("triton")[:2]:
        with record.attempt(f"AdamW, {kind.name}", needs=15):
            _adamw(machine, record, kind)
        torch.cuda.empty_cache()
    for dtype, vocab in itertools.product((torch.bfloat16, torch.float32), (128_256, 151_936, 50_257)):
        with record.attempt(f"rows, {dtype}, V {vocab}", needs=15):
            _rows(machine, record, dtype, vocab)
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _with(module: Any, name: str, value: Any) -> Generator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _call(module: Any, name: str, value: Any, call: Callable[[], object]) -> Callable[[], object]:
    def changed() -> None:
        with _with(module, name, value):
            call()

    return changed


def _best(record: Record, case: str, found: dict[str, Any]) -> None:
    best = min(found, key=lambda name: found[name].median)
    record.note(f"{case}: best is {best}")
    for name in found:
        if name != SHIPPED:
            ratio(record, case, found, name, SHIPPED)


def _adamw(machine: Machine, record: Record, kind: Any) -> None:
    from tunesmith_kernels.adamw import triton_step

    params = [
        nn.Parameter((torch.randn(size, device=machine.device) * 0.02).to(kind.dtype))
        for size in shapes(500_000_000)
    ]
    for param in params:
        param.grad = torch.full_like(param, 1e-4)
    optimizer = kind.make(params)
    calls: dict[str, Callable[[], object]] = {SHIPPED: optimizer.step}
    for chunk, block, warps in itertools.product((4096, 8192, 16384, 32768), (1024, 2048), (4, 8)):
        config = replace(triton_step.UPDATE, chunk_size=chunk, block=block, num_warps=warps)
        if config != triton_step.UPDATE:
            name = f"chunk {chunk}, block {block}, {warps} warps"
            calls[name] = _call(triton_step, "UPDATE", config, optimizer.step)
    case = f"AdamW update, {kind.name}"
    _best(record, case, interleaved(machine, record, case, calls, 5))


def _rows(machine: Machine, record: Record, dtype: torch.dtype, vocab: int) -> None:
    from tunesmith_kernels.linear_loss import triton_rows

    rows = 2048
    logits = torch.randn(rows, vocab, device=machine.device).to(dtype)
    target = torch.randint(vocab, (rows,), device=machine.device)
    inputs = RowInputs(target, None, None, torch.ones(rows, device=machine.device))
    loss, log_prob, entropy, lse = torch.zeros(4, rows, device=machine.device)
    correct = torch.zeros(rows, dtype=torch.bool, device=machine.device)
    outputs = RowOutputs(loss, log_prob, entropy, lse, correct)

    def call() -> None:
        triton_rows.triton_rows(logits, inputs, RowOptions(), outputs)

    shipped = triton_rows.config(vocab, logits.element_size(), False)
    calls: dict[str, Callable[[], object]] = {SHIPPED: call}
    for block, warps in itertools.product((1024, 2048, 4096, 8192, 16384), (4, 8, 16, 32)):
        config = replace(shipped, block=block, num_warps=warps)
        if config != shipped and 4 <= block // (32 * warps) <= 32:
            name = f"block {block}, {warps} warps"
            calls[name] = _call(triton_rows, "config", lambda *_, c=config: c, call)
    case = f"cross-entropy rows, {str(dtype).removeprefix('torch.')}, V {vocab}"
    _best(record, case, interleaved(machine, record, case, calls, 5))
