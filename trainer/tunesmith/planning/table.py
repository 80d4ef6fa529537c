"""A plan for people (a table and what follows from it) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.planning.choose import GIB, USABLE, Row
from tunesmith.planning.inspect import Inspected
from tunesmith.planning.memory import PARTS
from tunesmith.planning.timing import Device, assumptions
from tunesmith.planning.trace import Check

_HEADS = {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "activations": "activat.",
          "logits": "logits", "buffers": "buffers", "gather": "gather"}  # fmt: skip
_MEANING = {
    "weights": "the model's weights: shard them (fsdp2, zero3)",
    "gradients": "the gradients: shard them (zero2, fsdp2, zero3)",
    "optimizer": "the optimizer's state: shard it (zero1, zero2, fsdp2, zero3), or take one with less",
    "activations": "the activations: a smaller micro-batch, shorter rows, or model.gradient_checkpointing",
    "logits": "the logits: a smaller micro-batch or shorter rows",
    "buffers": "the communication's buffers",
    "gather": "the parameters that are whole while they are computed with",
}


def shown(rows: Sequence[Row], best: Row | None) -> list[Row]:
    """Of each strategy, with and without checkpointing: the largest micro-batch that fits, the smallest that does
    not; and the recommended row."""
    kept: list[Row] = []
    for key in dict.fromkeys((row.strategy, row.setup.checkpointing) for row in rows):
        alike = [row for row in rows if (row.strategy, row.setup.checkpointing) == key]
        fitting = [row for row in alike if row.fits]
        others = [row for row in alike if not row.fits]
        kept += [row for row in alike if row in (*fitting[-1:], *others[:1], best)]
    return kept


def show(
    found: Inspected,
    rows: Sequence[Row],
    best: Row | None,
    check: Check | None,
    device: Device,
    console: Console,
    *,
    everything: bool = False,
) -> None:
    work = found.workload
    world = rows[0].setup.world_size
    console.print(
        f"{work.name}: {work.numel / 1e6:,.1f} M parameters, {work.trainable / 1e6:,.1f} M trained, {work.precision}, "
        f"{work.rows_per_step} rows of {work.shape.length} tokens a step on {world} device{'s' * (world > 1)}"
    )
    table = Table(box=box.SIMPLE, title="GiB on one device, at its peak", title_justify="left")
    for head in ("strategy", "micro-batch", "checkpointing", *_HEADS.values(), "sum", "fits", "s/step"):
        table.add_column(head, justify="left" if head in {"strategy", "fits"} else "right")
    for row in rows if everything else shown(rows, best):
        table.add_row(*(Text(cell) for cell in _cells(row)), style="bold" if row is best else None)
    console.print(table)
    for line in conclusion(rows, best, check):
        console.print(line, markup=False)
    console.print(f"Time: {assumptions(device)}. It compares rows; it is no promise.", markup=False)
    for note in found.notes:
        console.print(f"Taken: {note}.", markup=False)


def _cells(row: Row) -> list[str]:
    parts = [getattr(row.memory, part) / GIB for part in PARTS]
    largest = max(range(len(parts)), key=parts.__getitem__)
    amounts = [f"{amount:.2f}{'*' if i == largest else ''}" for i, amount in enumerate(parts)]
    gap = abs(row.missing) / GIB
    fits = f"yes, {gap:.1f} left" if row.fits else f"no, {gap:.1f} too much"
    return [
        row.strategy,
        str(row.setup.rows),
        "yes" if row.setup.checkpointing else "no",
        *amounts,
        f"{row.memory.total / GIB:.2f}",
        fits,
        f"{row.time.total:.2f}",
    ]


def conclusion(rows: Sequence[Row], best: Row | None, check: Check | None) -> list[str]:
    """What the table says, in sentences."""
    usable = rows[0].usable / GIB
    lines = [
        f"* the largest part. usable: {usable:.1f} GiB, {USABLE:.0%} of the device's memory; the rest is for CUDA's "
        "context, NCCL and fragmentation (a rule of thumb, not measured)."
    ]
    if best is None:
        least = min(rows, key=lambda row: row.memory.total)
        lines.append(
            f"Nothing fits. {describe(least)} needs the least, {least.memory.total / GIB:.1f} GiB at the "
            f"{least.memory.moment}, {least.missing / GIB:.1f} too much. What weighs most is "
            f"{_MEANING[least.memory.dominating]}; or take more devices."
        )
        return lines
    lines.append(
        f"Recommended: {describe(best)}: {best.memory.total / GIB:.1f} GiB, the peak being at the "
        f"{best.memory.moment}; what weighs most is {_MEANING[best.memory.dominating]}."
    )
    lines.append(f"Why: {_reason(rows, best)}.")
    if check is not None:
        agreement = "agrees" if check.agrees else "differs by more than 10 %, so the interval is wider"
        lines.append(
            f"Checked: the whole depth, traced at this micro-batch, needs {check.traced / GIB:.1f} GiB: "
            f"it {agreement}. "
            f"Expect {check.low / GIB:.1f} to {check.high / GIB:.1f} GiB."
        )
    return lines


def describe(row: Row) -> str:
    steps = row.time.rows // (row.setup.rows * row.setup.world_size)
    more = f", {steps} micro-steps" if steps > 1 else ""
    checkpointing = "with" if row.setup.checkpointing else "without"
    return f"{row.strategy}, micro-batch {row.setup.rows}{more}, {checkpointing} checkpointing"


def _reason(rows: Sequence[Row], best: Row) -> str:
    fitting = [row for row in rows if row.fits]
    fastest = min(fitting, key=lambda row: row.time.total)
    simpler = [row for row in rows if not row.fits and rows.index(row) < rows.index(best)]
    names = dict.fromkeys(row.strategy for row in simpler if row.strategy != best.strategy)
    never = [name for name in names if not any(row.fits for row in rows if row.strategy == name)]
    why = (
        "it is the fastest of what fits"
        if fastest is best
        else f"of what fits nothing simpler is as fast (the fastest, {describe(fastest)}, gains "
        f"{1 - fastest.time.total / best.time.total:.1%})"
    )
    return why + (f"; {', '.join(never)}, simpler, never fit{'s' * (len(never) == 1)}" if never else "")


def as_json(found: Inspected, rows: Sequence[Row], best: Row | None, check: Check | None) -> dict[str, Any]:
    """All rows, in bytes and seconds."""
    return {
        "model": found.workload.name,
        "parameters": found.workload.numel,
        "trainable": found.workload.trainable,
        "precision": found.workload.precision,
        "usable_bytes": rows[0].usable,
        "rows": [_row(row) | {"recommended": row is best} for row in rows],
        "check": None
        if check is None
        else {"traced": check.traced, "low": check.low, "high": check.high, "agrees": check.agrees},
        "notes": found.notes,
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "strategy": row.setup.parallel.strategy,
        "shard_size": getattr(row.setup.parallel, "shard_size", None),
        "micro_batch": row.setup.rows,
        "gradient_checkpointing": row.setup.checkpointing,
        **{part: getattr(row.memory, part) for part in PARTS},
        "total": row.memory.total,
        "moment": row.memory.moment,
        "dominating": row.memory.dominating,
        "fits": row.fits,
        "seconds_per_step": row.time.total,
    }
