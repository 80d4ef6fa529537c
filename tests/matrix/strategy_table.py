"""docs/strategies-matrix.md, made from the records in docs/strategies-matrix.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.matrix.strategy_cells import CELLS, ENGINES, MIDDLE, OBJECTIVES, STEPS, Cell
from tests.matrix.strategy_proof import SAME, Record
from tests.matrix.strategy_settings import STRATEGIES, Strategy

DOCS = Path(__file__).parents[2] / "docs"
RESULTS, PAGE = DOCS / "strategies-matrix.json", DOCS / "strategies-matrix.md"

_HEAD = f"""\
# Strategies: what works with which objective, on which engine

Written by `make matrix MATRIX=strategies` from the records of its runs \
([strategies-matrix.json](strategies-matrix.json)); not typed. Tiny models with random weights, fp32, CPU, SGD.

Every cell is a run of {STEPS} steps, and what is left of it. ✓ says that

- the strategy has an effect: the weights are not those of the plain run, or what is decided after it is not;
- losses, norms of the gradient and weights do not depend on how a window is split, to {SAME:g}: in 8 micro-batches \
instead of one; on two processes as on one;
- the run, stopped after step {MIDDLE} and resumed, ends with the same bits.

The figure is the largest relative difference between the splits; – where the strategy draws by micro-batch (dropout), \
so that splits differ as two seeds do. A cell that is refused says why, with exit code 2, before anything is trained.

Not here: back-translation, which an untrained model cannot do (tests/numerics/test_augment_runs.py has it); adapters, \
freezing and unfreezing ([their own table](adapters-matrix.md)).
"""


def page(results: dict[str, Any]) -> str:
    """The whole page. `results`: `{"versions": {…}, "cells": [records]}`."""
    records = [Record(**values) for values in results["cells"]]
    found = {(record.strategy, record.column): record for record in records}
    reasons = list(dict.fromkeys(_reason(record) for record in records if _reason(record)))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        _HEAD,
        "## One process, every objective",
        _table(tuple(OBJECTIVES), found, reasons),
        "## Two processes",
        "On single-label classification, or on an objective that the strategy is for: "
        + "; ".join(f"{on} ({names})" for on, names in _elsewhere().items())
        + ".",
        _table(ENGINES, found, reasons),
        *(["## Reasons"] if reasons else []),
        "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)),
        f"Versions: {versions}.",
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _elsewhere() -> dict[str, str]:
    """The strategies that are tried on another objective, by that objective."""
    found: dict[str, list[str]] = {}
    for name, strategy in STRATEGIES.items():
        if strategy.on != Strategy.on:
            found.setdefault(strategy.on, []).append(name)
    return {on: ", ".join(names) for on, names in found.items()}


def _reason(record: Record) -> str:
    return record.refused or record.failed


def _table(columns: Iterable[str], found: dict[tuple[str, str], Record], reasons: list[str]) -> str:
    columns = list(columns)
    lines = [f"| strategy | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for strategy in STRATEGIES:
        cells = [_cell(found.get((strategy, column)), reasons) for column in columns]
        lines.append(f"| {strategy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(record: Record | None, reasons: list[str]) -> str:
    if record is None:
        return "not run"
    if reason := _reason(record):
        return f"{'refused' if record.refused else 'FAILS'} ({reasons.index(reason) + 1})"
    return "✓ –" if record.apart is None else f"✓ {record.apart:.0e}" if record.apart else "✓ 0"


def read_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def committed(cell: Cell) -> Record:
    """The record of a cell in the committed results."""
    [values] = [
        values
        for values in read_results()["cells"]
        if (values["strategy"], values["column"]) == (cell.strategy, cell.column)
    ]
    return Record(**values)


def write(records: Iterable[Record], versions: dict[str, str]) -> None:
    """Both files; of two records of a cell the later counts, and cells stand in the order of CELLS."""
    found = {(record.strategy, record.column): record for record in records}
    cells = [
        found[cell.strategy, cell.column].as_json() for cell in CELLS if (cell.strategy, cell.column) in found
    ]
    results = {"versions": versions, "cells": cells}
    lines = ",\n  ".join(json.dumps(values, ensure_ascii=False) for values in cells)
    RESULTS.write_text(
        f'{{"versions": {json.dumps(versions)},\n "cells": [\n  {lines}\n ]}}\n', encoding="utf-8"
    )
    PAGE.write_text(page(results), encoding="utf-8")
