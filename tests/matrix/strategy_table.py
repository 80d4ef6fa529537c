"""docs/strategies-matrix.md, made from the records in docs/strategies-matrix.json."""

from __future__ import annotations

from typing import Any

from tests.matrix.matrix_sheet import Sheet, joined
from tests.matrix.strategy_cells import CELLS, ENGINES, MIDDLE, OBJECTIVES, STEPS
from tests.matrix.strategy_proof import SAME, Record
from tests.matrix.strategy_settings import STRATEGIES, Strategy

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


def _shown(record: Record) -> str:
    return "–" if record.apart is None else f"{record.apart:.0e}" if record.apart else "0"


SHEET = Sheet("strategy", tuple(STRATEGIES), CELLS, Record, _shown, "strategies-matrix")


def page(results: dict[str, Any]) -> str:
    """The whole page. `results`: `{"versions": {…}, "cells": [records]}`."""
    records = SHEET.records(results)
    elsewhere = "; ".join(f"{on} ({names})" for on, names in _elsewhere().items())
    parts = [
        _HEAD,
        "## One process, every objective",
        SHEET.table("strategy", OBJECTIVES, records),
        "## Two processes",
        f"On single-label classification, or on an objective that the strategy is for: {elsewhere}.",
        SHEET.table("strategy", ENGINES, records),
    ]
    return joined(parts, records, results["versions"])


def _elsewhere() -> dict[str, str]:
    """The strategies that are tried on another objective, by that objective."""
    found: dict[str, list[str]] = {}
    for name, strategy in STRATEGIES.items():
        if strategy.on != Strategy.on:
            found.setdefault(strategy.on, []).append(name)
    return {on: ", ".join(names) for on, names in found.items()}
