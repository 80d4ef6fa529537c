"""What the ways to remember cost a step. MiniLM-L6 goes on from a run on standard-library docstrings; `auxiliary` has
half as many rows more of the same text, with masked words. Time: CPU time on one thread, in turns with the plain step.
Memory: the peak of a process of its own for each way, less that of the plain one, after three steps.

    python bench/remember_cost.py [--steps 8] [--rows 16]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from contestant import Contestant, contestant

from tunesmith.memory import peak_memory_bytes
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
from tunesmith.run import Resume, run

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "l2_sp": {"l2_sp": {}},
    "anchor": {"anchor": {}},
    "ewc": {"ewc": {"rows": 50}},
    "lwf": {"lwf": {}},
    "wise_ft": {"wise_ft": {}},
    "auxiliary": {},
}


def recipe(folder: str, rows: int, name: str, **sections: Any) -> Recipe:
    source = {"path": "builtin:stdlib_docstrings", "format": "classification", "limit": 600}
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "builtin:minilm"},
            "data": {"train": [source], "split": {"eval": 0.1}, "max_length": 64, "cache_dir": folder},
            "objective": {"type": "classification"},
            "training": {
                "max_steps": 1,
                "global_batch_size": rows,
                "per_device_train_batch_size": rows,
                "precision": "fp32",
            },
            "tracking": {"progress": "off"},
            "output_dir": folder,
            "run_name": name,
            **sections,
        }
    )


def auxiliary(folder: str, rows: int) -> Recipe:
    plain = recipe(folder, rows, "bench")
    text = {"path": "builtin:stdlib_docstrings", "format": "text", "limit": 600, "columns": {"text": "text"}}
    values = plain.model_dump(exclude={"data", "objective", "tasks", "multitask"}, exclude_unset=True)
    own = {"data": plain.data.model_dump(exclude_unset=True), "objective": {"type": "classification"}}
    words = {"data": {**own["data"], "train": [text]}, "objective": {"type": "masked_lm"}, "weight": 0.1}
    values["training"]["global_batch_size"] = rows + rows // 2
    mixing = {"type": "together", "rows": {"own": rows, "words": rows // 2}}
    return Recipe.model_validate(
        {**values, "tasks": {"own": own, "words": words}, "multitask": {"mixing": mixing}}
    )


def built(name: str, rows: int, folder: str) -> Contestant:
    old = {"model": {"model_name_or_path": f"{folder}/old/final"}}
    if name == "auxiliary":
        made = auxiliary(folder, rows)
    elif name == "plain":
        made = recipe(folder, rows, "bench", **old)
    else:
        made = recipe(folder, rows, "bench", **old, remember={"run": f"{folder}/old", **SETTINGS[name]})
    return contestant(made)


def peak(name: str, rows: int, folder: str) -> int:
    torch.set_num_threads(1)
    quiet_libraries()
    one = built(name, rows, folder)
    for step in range(3):
        one.step(step)
    return peak_memory_bytes(one.engine.device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        # first, for a child's peak begins with that of its parent
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            pool.submit(run, recipe(folder, asked.rows, "old"), Path(), Resume()).result()
            peaks = {name: pool.submit(peak, name, asked.rows, folder).result() for name in SETTINGS}
        runners = {name: built(name, asked.rows, folder) for name in SETTINGS}
        times = [{name: one.step(step) for name, one in runners.items()} for step in range(asked.steps + 1)]
    plain = statistics.median(row["plain"] for row in times[1:])
    print(f"plain step: {plain:.2f} s, peak {peaks['plain'] / 2**20:.0f} MiB")
    for name in list(SETTINGS)[1:]:
        ratios = [row[name] / row["plain"] for row in times[1:]]
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        more = (peaks[name] - peaks["plain"]) / 2**20
        print(f"{name:9s} × {statistics.median(ratios):.2f} {spread}, peak {more:+.0f} MiB")


if __name__ == "__main__":
    main()
