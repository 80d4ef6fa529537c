"""docs/adapters-matrix.md, made from the records in docs/adapters-matrix.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.matrix.matrix_cells import CELLS, ENGINE_FAMILY, ENGINES, FAMILIES, METHODS, MIDDLE, STEPS, Cell
from tests.matrix.matrix_proof import SAME, SAME_LOSSES, Record

DOCS = Path(__file__).parents[2] / "docs"
RESULTS, PAGE = DOCS / "adapters-matrix.json", DOCS / "adapters-matrix.md"

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


def page(results: dict[str, Any]) -> str:
    """The whole page. `results`: `{"versions": {…}, "cells": [records]}`."""
    records = [Record(**values) for values in results["cells"]]
    found = {(record.method, record.column): record for record in records}
    reasons = list(dict.fromkeys(_reason(record) for record in records if _reason(record)))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        _HEAD,
        "## One process",
        _table(tuple(FAMILIES), found, reasons),
        f"## Two processes ({ENGINE_FAMILY})",
        _table(ENGINES, found, reasons),
        *(["## Reasons"] if reasons else []),
        "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)),
        "## Figures of one process",
        _figures(records),
        f"Versions: {versions}.",
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _reason(record: Record) -> str:
    return record.refused or record.failed


def _table(columns: Iterable[str], found: dict[tuple[str, str], Record], reasons: list[str]) -> str:
    columns = list(columns)
    lines = [f"| trained | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method in METHODS:
        cells = [_cell(found.get((method, column)), reasons) for column in columns]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(record: Record | None, reasons: list[str]) -> str:
    if record is None:
        return "not run"
    if reason := _reason(record):
        return f"{'refused' if record.refused else 'FAILS'} ({reasons.index(reason) + 1})"
    return f"✓ {_difference(record.reloaded)} · {_difference(record.merged)}"


def _difference(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.0e}"


def _figures(records: list[Record]) -> str:
    lines = ["| trained | on | loss | parameters trained | of | bytes saved |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {record.method} | {record.column} | {record.first_loss:.3f} → {record.last_loss:.3f} | "
        f"{record.trained:,} | {record.trained + record.frozen:,} | {record.bytes:,} |"
        for record in records
        if record.column in FAMILIES and not _reason(record)
    ]
    return "\n".join(lines)


def read_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def committed(cell: Cell) -> Record:
    """The record of a cell in the committed results."""
    [values] = [
        values
        for values in read_results()["cells"]
        if (values["method"], values["column"]) == (cell.method, cell.column)
    ]
    return Record(**values)


def write(records: Iterable[Record], versions: dict[str, str]) -> None:
    """Both files; of two records of a cell the later counts, and cells stand in the order of CELLS."""
    found = {(record.method, record.column): record for record in records}
    cells = [
        found[cell.method, cell.column].as_json() for cell in CELLS if (cell.method, cell.column) in found
    ]
    results = {"versions": versions, "cells": cells}
    lines = ",\n  ".join(json.dumps(values, ensure_ascii=False) for values in cells)
    RESULTS.write_text(
        f'{{"versions": {json.dumps(versions)},\n "cells": [\n  {lines}\n ]}}\n', encoding="utf-8"
    )
    PAGE.write_text(page(results), encoding="utf-8")
