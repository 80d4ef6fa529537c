"""A fixed part of the matrix, held against the committed records; and the page against these. `make matrix` runs all
of it, and writes both."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.matrix.matrix_cells import CELLS, METHODS, Cell
from tests.matrix.matrix_models import build_workshop
from tests.matrix.matrix_proof import prove
from tests.matrix.matrix_table import SHEET, page
from tests.numerics.rank_pool import LivingPools

pytestmark = [
    # of PEFT's own from_pretrained, which users call, not we
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

BERT, GPT2, LLAMA, T5 = "BERT, classification", "GPT-2, causal_lm", "Llama, sft", "T5, seq2seq"

# every method once, every family and engine, and what is most easily broken: tied weights, virtual tokens, bases that
# change or are in few bits, shards
ALONE = [
    ("lora", GPT2), ("rslora", T5), ("dora", BERT), ("lora+", LLAMA), ("pissa", T5), ("olora", LLAMA),
    ("lora, modules_to_save", GPT2), ("ia3", T5), ("prompt_tuning", LLAMA), ("prefix_tuning", T5), ("p_tuning", BERT),
    ("qlora, nf4", LLAMA), ("qlora, int8", BERT), ("vera", LLAMA), ("oft", BERT), ("adalora", BERT),
    ("head only", BERT), ("biases and head (BitFit)", GPT2), ("gradual unfreezing, layer decay", LLAMA),
]  # fmt: skip
SPREAD = [
    ("lora+", "ddp"), ("lora", "zero2"), ("lora", "zero3"), ("lora", "fsdp2"), ("dora", "fsdp2"), ("pissa", "zero3"),
    ("lora, modules_to_save", "zero3"), ("prompt_tuning", "fsdp2"), ("ia3", "zero3"), ("qlora, nf4", "ddp"),
    ("qlora, nf4", "zero3"), ("last layer and head", "fsdp2"), ("gradual unfreezing, layer decay", "zero3"),
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
    assert (found.trained, found.frozen, found.tensors) == (
        expected.trained,
        expected.frozen,
        expected.tensors,
    )


@pytest.mark.parametrize(("method", "column"), ALONE)
def test_a_cell_of_one_process(method: str, column: str, workshop: Path, pools: LivingPools) -> None:
    _holds(Cell(method, column), workshop, pools)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "column"), SPREAD)
def test_a_cell_of_two_processes(method: str, column: str, workshop: Path, pools: LivingPools) -> None:
    _holds(Cell(method, column), workshop, pools)


def test_the_page_is_what_the_records_say() -> None:
    results = SHEET.read()
    assert SHEET.page.read_text(encoding="utf-8") == page(results)
    known = [(cell.method, cell.column) for cell in CELLS]
    places = [known.index((cell["method"], cell["column"])) for cell in results["cells"]]
    assert places == list(range(len(known)))
    assert [(cell["method"], cell["column"]) for cell in results["cells"] if cell["failed"]] == []


def test_a_page_shows_every_outcome() -> None:
    results = SHEET.read()
    first, second, *rest = results["cells"]
    assert (first["method"], second["method"]) == tuple(list(METHODS)[:2])
    changed = page(
        {
            "versions": {"torch": "1"},
            "cells": [first | {"failed": "it broke"}, second | {"refused": "cannot"}, *rest[1:]],
        }
    )
    method = list(METHODS)
    rows = {line.split(" | ")[0]: line for line in reversed(changed.splitlines()) if line.startswith("| ")}
    assert rows[f"| {method[0]}"].split(" | ")[1] == "FAILS (1)"
    assert rows[f"| {method[1]}"].split(" | ")[1] == "refused (2)"
    assert rows[f"| {method[2]}"].split(" | ")[1] == "not run"
    assert "\n1. it broke\n2. cannot\n" in changed
