"""Checks on the objects that were built, before the first step."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.batch import Batch
from tunesmith.compiling import explain_break
from tunesmith.data.stream import Stream
from tunesmith.engine import Engine
from tunesmith.errors import MachineError, TrainingStopped, UserError

PACKING_TOLERANCE = 1e-4  # relative, fp32: measured < 1e-6 where packing isolates, > 0.3 where it leaks
ROUNDED_TOLERANCE = 0.05  # where an engine gathers its weights in 16 bits


def probe(engine: Engine, stream: Stream) -> dict[str, float | int | list[str]]:
    """One forward and backward of the longest rows of every task, on the unwrapped module: what fails for want of
    memory fails now. Parameters that the loss does not use, or a task's does not, are noted in the module, which
    touches them in every step: the gradient that a step has not is zero, on every engine."""
    found = [_longest(engine, one) for one in stream.each.values()]
    unused = list(dict.fromkeys(name for _, some in found for name in some))
    engine.leave_unused(unused)
    return {"longest_row_tokens": max(width for width, _ in found), "unused_parameters": unused}


def _longest(engine: Engine, stream: Stream) -> tuple[int, list[str]]:
    """The width of the longest batch, and the trained parameters that its loss does not use."""
    lengths = stream.dataset.table.lengths()
    longest = int(lengths.argmax())
    # packed, a sequence is filled up to its length
    repeats = 1 if stream.pack_length is None else max(1, stream.pack_length // int(lengths[longest]))
    cell = [[longest] * repeats] * min(stream.per_device, len(stream.dataset))
    batch = stream.batch(cell, 0, longest)
    ones = torch.ones(len(engine.train_module.terms), device=engine.device)
    try:
        rehearsal = engine.rehearse(batch, ones)
    except torch.OutOfMemoryError:
        raise MachineError(
            f"the longest batch ({len(cell)} × {_width(batch)} tokens) does not fit into the memory of "
            f"{engine.device}: lower training.per_device_train_batch_size or data.max_length, or set "
            "model.gradient_checkpointing: true"
        ) from None
    except RuntimeError as error:
        if (told := explain_break(error)) is None:
            raise
        raise UserError(told) from error
    if not torch.isfinite(rehearsal.loss):
        raise TrainingStopped(
            f"the loss of the longest row ({stream.dataset.place(longest)}) is {float(rehearsal.loss)} before any "
            "training"
        )
    return _width(batch), rehearsal.unused


def check_packing(stream: Stream, engine: Engine) -> float:
    """The largest difference between the logits of a row packed behind another and of the row alone, relative to the
    largest logit, in fp32 without dropout. Packing that lets rows see each other is refused.

    The logits, not the loss: summed over a long row of a fresh model the loss changes by 2e-5 only."""
    lengths = stream.dataset.table.lengths()
    rows = [
        int(row)
        for row in lengths.argsort(kind="stable")[-512:]
        if lengths[row] * 2 <= (stream.pack_length or 0)
    ]
    rows = rows[-2:] if len(rows) >= 2 else [int(row) for row in lengths.argsort(kind="stable")[:2]]
    if len(rows) < 2 or int(lengths[rows].sum()) > (stream.pack_length or 0):
        return 0.0  # no two rows ever share a sequence
    first, second = rows
    module = engine.train_module
    module.eval()
    with torch.no_grad():
        both = stream.batch([[first, second]], 0, first)
        packed: Tensor = engine.forward(both, "logits")[:, int(lengths[first]) :]
        alone: Tensor = engine.forward(stream.batch([[second]], 0, second), "logits")
    module.train()
    difference = float((packed - alone).abs().max() / alone.abs().max())
    tolerance = ROUNDED_TOLERANCE if engine.builds_empty and module.precision != "fp32" else PACKING_TOLERANCE
    if not difference <= tolerance:
        raise UserError(
            f"data.packing: {type(module.model).__name__} lets packed rows see each other "
            f"(their logits change by {difference:.1e}): set packing: false"
        )
    return difference


def _width(batch: Batch) -> int:
    return max(value.shape[-1] for value in batch.inputs.values() if value.ndim > 1)
