"""docs/adapters-matrix.md, made from the records in docs/adapters-matrix.json."""

from __future__ import annotations

from typing import Any

from tests.matrix.matrix_cells import CELLS, ENGINE_FAMILY, ENGINES, FAMILIES, METHODS, MIDDLE, STEPS
from tests.matrix.matrix_proof import SAME, SAME_LOSSES, Record
from tests.matrix.matrix_sheet import Sheet, joined, reason

_HEAD = f"""\
# Adapters: what works, on which model, on which engine

Written by `make matrix` from the records of its runs ([adapters-matrix.json](adapters-matrix.json)); not typed. Tiny \
models of each family with random weights, fp32, CPU.

Every cell is a run of {STEPS} steps, and what is left of it. ✓ says that

- the loss of the same 16 rows falls;
- everything that was trained moved and is in `final/` with the trained values, and everything else kept its bits;
- `final/`, loaded by PEFT (or transformers) alone, gives the outputs of the trained model to {SAME:g} of the largest;
- so does the model with its adapter merged (into the dequantised base), to {METHODS["lora"].merges:g};
- the run, stopped after step {MIDDLE} and resumed, ends with the same bits and the same file;
- on two processes the losses are those of one, to {SAME_LOSSES:g}.

The figures are the largest differences of outputs, loaded again · merged, relative to the largest output; – where \
there is nothing to merge. A cell that is refused says why, with exit code 2, before anything is trained.
"""


def _shown(record: Record) -> str:
    return f"{_difference(record.reloaded)} · {_difference(record.merged)}"


def _difference(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.0e}"


SHEET = Sheet("method", tuple(METHODS), CELLS, Record, _shown, "adapters-matrix")


def page(results: dict[str, Any]) -> str:
    """The whole page. `results`: `{"versions": {…}, "cells": [records]}`."""
    records = SHEET.records(results)
    parts = [
        _HEAD,
        "## One process",
        SHEET.table("trained", FAMILIES, records),
        f"## Two processes ({ENGINE_FAMILY})",
        SHEET.table("trained", ENGINES, records),
    ]
    return joined(parts, records, results["versions"], "## Figures of one process", _figures(records))


def _figures(records: list[Record]) -> str:
    lines = ["| trained | on | loss | parameters trained | of | bytes saved |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {record.method} | {record.column} | {record.first_loss:.3f} → {record.last_loss:.3f} | "
        f"{record.trained:,} | {record.trained + record.frozen:,} | {record.bytes:,} |"
        for record in records
        if record.column in FAMILIES and not reason(record)
    ]
    return "\n".join(lines)
