"""Checks on the objects that were built, before the first step."""

from __future__ import annotations

from typing import cast

import torch

from tunesmith.batch import Batch
from tunesmith.data.stream import Stream
from tunesmith.engine import Engine
from tunesmith.errors import MachineError, TrainingStopped, UserError
from tunesmith.module import Loss

PACKING_TOLERANCE = 1e-4  # relative, fp32: measured 5e-7 where packing isolates, > 1e-2 where it leaks


def probe(engine: Engine, stream: Stream) -> dict[str, float | int | list[str]]:
    """One forward and backward of the longest rows, on the unwrapped module: what fails for want of memory fails
    now. Parameters that the loss does not use are noted in the module, which touches them in every step."""
    longest = int(stream.dataset.table.lengths().argmax())
    cell = [[longest]] * min(stream.per_device, len(stream.dataset))
    batch = stream.batch(cell, 0, longest)
    try:
        loss = _loss(engine, batch)
        loss.total.backward()
    except torch.OutOfMemoryError:
        raise MachineError(
            f"the longest batch ({len(cell)} × {_width(batch)} tokens) does not fit into the memory of "
            f"{engine.device}: lower training.per_device_train_batch_size or data.max_length, or set "
            "model.gradient_checkpointing: true"
        ) from None
    module = engine.train_module
    unused = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    engine.optimizer.zero_grad(set_to_none=True)
    module.zero_grad(set_to_none=True)
    module.untouched = tuple(unused)
    if not torch.isfinite(loss.total):
        raise TrainingStopped(
            f"the loss of the longest row ({stream.dataset.place(longest)}) is {float(loss.total)} before any training"
        )
    return {"longest_row_tokens": _width(batch), "unused_parameters": unused}


def check_packing(stream: Stream, engine: Engine) -> float:
    """The largest relative difference between the loss of rows packed into one sequence and of the rows alone, in
    fp32 without dropout. Packing that lets rows see each other is refused."""
    lengths = stream.dataset.table.lengths()
    rows = [
        int(row)
        for row in lengths.argsort(kind="stable")[-512:]
        if lengths[row] * 2 <= (stream.pack_length or 0)
    ]
    rows = rows[-2:] if len(rows) >= 2 else [int(row) for row in lengths.argsort(kind="stable")[:2]]
    if len(rows) < 2 or int(lengths[rows].sum()) > (stream.pack_length or 0):
        return 0.0  # no two rows ever share a sequence
    module = engine.train_module
    was, module.precision = module.precision, "fp32"
    module.eval()
    with torch.no_grad():
        together = _loss(engine, stream.batch([rows], 0, rows[0])).parts.double()
        apart = sum(_loss(engine, stream.batch([[row]], 0, row)).parts.double() for row in rows)
    module.precision = was
    module.train()
    difference = float(((together - apart).abs() / cast(torch.Tensor, apart).abs().clamp(min=1e-12)).max())
    if difference > PACKING_TOLERANCE:
        raise UserError(
            f"data.packing: {type(module.model).__name__} lets packed rows see each other "
            f"(their loss changes by {difference:.1e}): set packing: false"
        )
    return difference


def _loss(engine: Engine, batch: Batch) -> Loss:
    ones = torch.ones(len(engine.train_module.objective.terms), device=engine.device)
    return engine.train_module(batch.to(engine.device), "loss", ones)


def _width(batch: Batch) -> int:
    return max(value.shape[-1] for value in batch.inputs.values() if value.ndim > 1)
