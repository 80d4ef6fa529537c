"""Runs every cell of a matrix and writes its page: `python -m tests.matrix adapters` or `strategies`. With more words
only the cells whose names hold all of them, whose records then take the place of the older ones:
`python -m tests.matrix adapters ia3 zero3`."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.matrix import (
    matrix_cells,
    matrix_models,
    matrix_proof,
    matrix_table,
    strategy_cells,
    strategy_proof,
    strategy_settings,
    strategy_table,
)
from tests.numerics.rank_pool import LivingPools

VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed")
SUBJECTS: dict[str, tuple[Any, Any, Any, Any]] = {
    "adapters": (matrix_models, matrix_cells, matrix_proof, matrix_table),
    "strategies": (strategy_settings, strategy_cells, strategy_proof, strategy_table),
}


def main(subject: str, words: list[str]) -> int:
    models, cells, proof, table = SUBJECTS[subject]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PEFT's and transformers' own, of the loading that is not ours
    chosen = [cell for cell in cells.CELLS if all(word in str(cell) for word in words)]
    versions = {name: version(name) for name in VERSIONS}
    records: list[Any] = []
    sheet = table.SHEET
    if words and sheet.results.exists():
        older = sheet.read()
        if older["versions"] != versions:
            sys.exit(f"the other records are of {older['versions']}: run them all")
        records += sheet.records(older)
    pools = LivingPools()
    try:
        with tempfile.TemporaryDirectory() as folder:
            workshop = Path(folder)
            models.build_workshop(workshop)
            for number, cell in enumerate(chosen, start=1):
                started = time.perf_counter()
                record = proof.prove(cell, workshop, pools)
                records.append(record)
                sheet.write(records, versions, table.page)
                said = "✓"
                if record.failed or record.refused:
                    said = f"FAILS: {record.failed}" if record.failed else f"refused: {record.refused}"
                seconds = time.perf_counter() - started
                print(f"{number}/{len(chosen)} {seconds:5.1f} s  {cell}  {said}", flush=True)
    finally:
        pools.stop()
    return int(any(record.failed for record in records[-len(chosen) :]))


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if sys.argv[1:2] not in [[name] for name in SUBJECTS]:
        sys.exit(f"which matrix: {' or '.join(SUBJECTS)}?")
    sys.exit(main(sys.argv[1], sys.argv[2:]))
