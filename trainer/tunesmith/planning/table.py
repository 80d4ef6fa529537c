"""A plan for people (a table and what follows from it) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

_HEADS = {"weights": "weights", "gradients": "grads", "optimizer": "optim", "activations": "activ.",
          "logits": "logits", "buffers": "buffers", "gather": "gather"}  # fmt: skip
_WIDTH = 120  # a narrower terminal wraps the lines itself: a number that is cut says nothing
_NAMES = {
    "weights": "the weights",
    "gradients": "the gradients",
    "optimizer": "the optimizer's state",
    "activations": "the activations",
    "logits": "the logits",
    "buffers": "the communication's buffers",
    "gather": "the parameters that are whole while they are computed with",
}
_LESS = {
    "weights": "fsdp2 and zero3 shard them",
    "gradients": "zero2, fsdp2 and zero3 shard them",
    "optimizer": "zero1, zero2, fsdp2 and zero3 shard it",
    "activations": "less with a smaller micro-batch, shorter rows or model.gradient_checkpointing",
    "logits": "less with a smaller micro-batch or shorter rows",
}


@dataclass(frozen=True, slots=True)
class Unit:
    """What bytes are shown in."""

    name: str
    bytes: int

    def __call__(self, amount: float) -> str:
        return f"{amount / self.bytes:,.1f} {self.name}"


def unit_for(rows: Sequence[Row]) -> Unit:
    """GiB, or MiB where everything is small."""
    largest = max(row.memory.total for row in rows)
    return Unit("GiB", GIB) if largest >= 4 * GIB else Unit("MiB", 2**20)


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
    unit = unit_for(rows)
    title = f"{unit.name} on one device, at its peak (micro: rows of a forward; ckpt: gradient checkpointing)"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
    for head in ("strategy", "micro", "ckpt", *_HEADS.values(), "sum", "fits", "step"):
        table.add_column(head, justify="left" if head in {"strategy", "fits"} else "right", no_wrap=True)
    for row in rows if everything else shown(rows, best):
        table.add_row(*(Text(cell) for cell in _cells(row, unit)), style="bold" if row is best else None)
    wide = Console(
        file=console.file,
        width=max(console.width, _WIDTH),
        force_terminal=console.is_terminal,
        color_system="auto" if console.is_terminal else None,
    )
    wide.print(table)
    for line in conclusion(rows, best, check):
        console.print(line, markup=False)
    console.print(f"Time: {assumptions(device)}. It compares rows; it is no promise.", markup=False)
    for note in found.notes:
        console.print(f"Taken: {note}.", markup=False)


def _cells(row: Row, unit: Unit) -> list[str]:
    parts = [getattr(row.memory, part) / unit.bytes for part in PARTS]
    largest = max(range(len(parts)), key=parts.__getitem__)
    amounts = [f"{_number(amount)}{'*' if i == largest else ''}" for i, amount in enumerate(parts)]
    gap = _number(abs(row.missing) / unit.bytes)
    return [
        row.strategy,
        str(row.setup.rows),
        "yes" if row.setup.checkpointing else "no",
        *amounts,
        _number(row.memory.total / unit.bytes),
        f"yes, {gap} left" if row.fits else f"no, {gap} over",
        f"{row.time.total:.2f} s" if row.time.total >= 1 else f"{row.time.total * 1e3:.1f} ms",
    ]


def _number(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:.1f}" if amount >= 10 else f"{amount:.2f}"


def _heaviest(row: Row) -> str:
    part = row.memory.dominating
    sharded = part in {"weights", "gradients", "optimizer"} and row.strategy.startswith(("fsdp2", "zero3"))
    advice = "" if sharded or part not in _LESS else f" ({_LESS[part]})"
    return f"{_NAMES[part]}{advice}"


def conclusion(rows: Sequence[Row], best: Row | None, check: Check | None) -> list[str]:
    """What the table says, in sentences."""
    unit = unit_for(rows)
    lines = [
        f"* the largest part. Usable: {unit(rows[0].usable)}, {USABLE:.0%} of the device's memory; the rest is for "
        "CUDA's context, NCCL and fragmentation (a rule of thumb, not measured)."
    ]
    if best is None:
        least = min(rows, key=lambda row: row.memory.total)
        lines.append(
            f"Nothing fits. {describe(least)} needs the least, {unit(least.memory.total)} at the "
            f"{least.memory.moment}, {unit(least.missing)} too much. What weighs most: {_heaviest(least)}. More "
            "devices, a smaller model or shorter rows would help."
        )
        return lines
    lines.append(
        f"Recommended: {describe(best)}: {unit(best.memory.total)}, the peak being at the {best.memory.moment}. What "
        f"weighs most: {_heaviest(best)}."
    )
    lines.append(f"Why: {_reason(rows, best)}.")
    if check is not None:
        agreement = "agrees" if check.agrees else "differs by more than 10 %, so the interval is wider"
        lines.append(
            f"Checked: the whole depth, traced at this micro-batch, needs {unit(check.traced)}: it {agreement}. "
            f"Expect {unit(check.low)} to {unit(check.high)}."
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
