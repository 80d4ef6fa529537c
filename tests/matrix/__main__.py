"""Runs every cell and writes the page: `python -m tests.matrix`. With words only the cells whose names hold all of
them, whose records then take the place of the older ones: `python -m tests.matrix ia3 zero3`."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

from tests.matrix.matrix_cells import CELLS
from tests.matrix.matrix_models import build_workshop
from tests.matrix.matrix_proof import Record, prove
from tests.matrix.matrix_table import read_results, write
from tests.numerics.rank_pool import LivingPools

VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed")


def main(words: list[str]) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PEFT's and transformers' own, of the loading that is not ours
    chosen = [cell for cell in CELLS if all(word in str(cell) for word in words)]
    versions = {name: version(name) for name in VERSIONS}
    records: list[Record] = []
    if words:
        older = read_results()
        if older["versions"] != versions:
            sys.exit(f"the other records are of {older['versions']}: run them all")
        records += [Record(**values) for values in older["cells"]]
    pools = LivingPools()
    try:
        with tempfile.TemporaryDirectory() as folder:
            workshop = Path(folder)
            build_workshop(workshop)
            for number, cell in enumerate(chosen, start=1):
                started = time.perf_counter()
                record = prove(cell, workshop, pools)
                records.append(record)
                write(records, versions)
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
    sys.exit(main(sys.argv[1:]))
