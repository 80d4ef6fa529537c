"""A fixed part of the strategies' matrix, held against the committed records; and the page against these. `make matrix`
runs all of it, and writes both."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.matrix.strategy_cells import CELLS, Cell
from tests.matrix.strategy_proof import prove
from tests.matrix.strategy_settings import STRATEGIES, build_workshop
from tests.matrix.strategy_table import SHEET, page
from tests.numerics.rank_pool import LivingPools

# each kind of part (stream, term, penalty, step, rollout, state) and each objective, and what is refused by the rules,
# by the data and by the model
FAST = [
    ("loss: focal", "seq2seq"), ("loss: LDAM, weights later", "tokens"), ("loss: ranking", "regression"),
    ("loss: label smoothing", "masked_lm"), ("loss: dice", "sft"), ("loss: soft labels", "tokens"),
    ("sampling: balanced", "tokens"), ("calibration", "multi label"), ("curriculum: a column", "question answering"),
    ("length schedule", "causal_lm"), ("augment: token drop, swap", "sft"), ("augment: mixup", "regression"),
    ("NEFTune", "sft"), ("SAM", "masked_lm"), ("PGD", "span_corruption"), ("max-norm", "causal_lm"),
    ("EMA", "multi label"), ("remember: EWC", "question answering"), ("remember: LwF", "single label"),
    ("remember: LwF", "sft"), ("remember: LwF", "tokens"), ("distill: embedding", "tokens"),
    ("distill: on-policy", "sft"), ("tasks: together, GradNorm", "tokens"),
]  # fmt: skip
SLOW = [
    ("loss: a function", "multi label"), ("thresholds", "single label"), ("curriculum: a run's loss", "seq2seq"),
    ("augment: synonyms", "question answering"), ("augment: cutoff", "seq2seq"),
    ("stochastic depth", "span_corruption"), ("R-Drop", "tokens"), ("gradient noise", "regression"),
    ("SWA", "causal_lm"), ("remember: WiSE-FT", "masked_lm"), ("remember: replay", "tokens"),
    ("distill: hidden states", "seq2seq"),
    ("distill: attention", "masked_lm"), ("distill: other tokenizer", "sft"), ("tasks: in turn, DWA", "sft"),
]  # fmt: skip
SPREAD = [
    ("loss: class weights", "zero2"), ("loss: ranking", "fsdp2"), ("sampling: balanced", "ddp"),
    ("calibration", "zero3"), ("augment: mixup", "fsdp2"), ("L1, L2", "zero3"), ("R-Drop", "zero1"), ("SAM", "zero2"),
    ("ASAM", "fsdp2"), ("FGM", "zero3"), ("max-norm", "fsdp2"), ("EMA", "zero3"), ("SWA", "fsdp2"),
    ("remember: EWC", "fsdp2"), ("remember: LwF", "zero3"), ("remember: replay", "fsdp2"), ("distill: logits", "zero1"),
    ("distill: hidden states", "fsdp2"), ("distill: on-policy", "zero3"), ("tasks: together, uncertainty", "zero3"),
    ("tasks: together, GradNorm", "fsdp2"), ("tasks: annealed", "ddp"),
    ("distill: sequence level", "zero3"),
]  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("matrix")
    build_workshop(root)
    return root


def _holds(cell: Cell, workshop: Path, pools: LivingPools) -> None:
    expected, found = SHEET.committed(cell), prove(cell, workshop, pools)
    assert found.failed == ""
    assert found.refused == expected.refused
    assert (found.apart is None) == (expected.apart is None)
    assert found.moved == pytest.approx(expected.moved, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize(("strategy", "column"), FAST)
def test_a_cell_of_one_process(strategy: str, column: str, workshop: Path, pools: LivingPools) -> None:
    _holds(Cell(strategy, column), workshop, pools)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "column"), SLOW)
def test_another_cell_of_one_process(strategy: str, column: str, workshop: Path, pools: LivingPools) -> None:
    _holds(Cell(strategy, column), workshop, pools)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "column"), SPREAD)
def test_a_cell_of_two_processes(strategy: str, column: str, workshop: Path, pools: LivingPools) -> None:
    _holds(Cell(strategy, column), workshop, pools)


def test_the_page_is_what_the_records_say() -> None:
    results = SHEET.read()
    assert SHEET.page.read_text(encoding="utf-8") == page(results)
    known = [(cell.strategy, cell.column) for cell in CELLS]
    assert [(cell["strategy"], cell["column"]) for cell in results["cells"]] == known
    assert [(cell["strategy"], cell["column"]) for cell in results["cells"] if cell["failed"]] == []


def test_every_strategy_works_on_its_own_objective_and_somewhere_in_shards() -> None:
    found = {(cell["strategy"], cell["column"]): cell for cell in SHEET.read()["cells"]}
    for name, strategy in STRATEGIES.items():
        assert found[name, strategy.on]["refused"] == "", name
        assert any(found[name, engine]["refused"] == "" for engine in ("zero2", "zero3", "fsdp2")), name


def test_a_page_shows_every_outcome() -> None:
    first, second, *rest = SHEET.read()["cells"]
    names = list(STRATEGIES)
    assert (first["strategy"], second["strategy"]) == (names[0], names[1])
    worked = {"refused": "", "failed": "", "moved": 0.1, "apart": 2e-7}
    changed = page(
        {
            "versions": {"torch": "1"},
            "cells": [
                first | worked | {"failed": "it broke"},
                second | worked | {"refused": "cannot"},
                rest[0] | worked,
                rest[1] | worked | {"apart": None},
                *rest[3:],
            ],
        }
    )
    rows = {line.split(" | ")[0]: line for line in reversed(changed.splitlines()) if line.startswith("| ")}
    said = [rows[f"| {name}"].split(" | ")[1] for name in names[:5]]
    assert said == ["FAILS (1)", "refused (2)", "✓ 2e-07", "✓ –", "not run"]
    assert "\n1. it broke\n2. cannot\n" in changed
