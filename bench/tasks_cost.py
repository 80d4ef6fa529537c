"""What several tasks, and the balancing of their losses, cost a step: CPU time on one thread, all in turns. MiniLM-L6
on standard-library docstrings (the quickstart's data), as one task, and as three that each take a third of the rows;
rows are cut to 32 tokens, which most have, so that windows of other rows are of like size.

    python bench/tasks_cost.py [--steps 8] [--rows 24]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

import torch
from contestant import Contestant, contestant

from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe

BALANCING = ("fixed", "uncertainty", "dwa", "gradnorm")


def built(balancing: str | None, rows: int, cache: str) -> Contestant:
    source = {"path": "builtin:stdlib_docstrings", "format": "classification"}
    task = {
        "data": {"train": [source], "max_length": 32, "cache_dir": cache},
        "objective": {"type": "classification"},
    }
    what: dict[str, Any] = task
    if balancing is not None:
        multitask = {"mixing": {"type": "together"}, "balancing": {"type": balancing}}
        what = {"tasks": {"one": task, "two": task, "three": task}, "multitask": multitask}
    made = Recipe.model_validate(
        {
            "model": {"model_name_or_path": "builtin:minilm"},
            # three forwards of a third of the rows in any case
            "training": {"global_batch_size": rows, "per_device_train_batch_size": rows // 3},
            "run_name": "bench",
            **what,
        }
    )
    return contestant(made)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=24)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as cache:
        runners = {name or "one task": built(name, asked.rows, cache) for name in (None, *BALANCING)}
        times = [{name: one.step(step) for name, one in runners.items()} for step in range(asked.steps + 1)]
    print(f"one task: {statistics.median(row['one task'] for row in times[1:]):.2f} s")
    for name, plain in (("fixed", "one task"), *((name, "fixed") for name in BALANCING[1:])):
        ratios = [row[name] / row[plain] for row in times[1:]]
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:12s} {statistics.median(ratios):.2f} of {plain}  {spread}")


if __name__ == "__main__":
    main()
