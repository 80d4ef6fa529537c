"""What each kind of `regularization` costs a step: CPU time on one thread, the plain step and all others in turns, on
the same rows. MiniLM-L6 classifies standard-library docstrings (the quickstart's data).

    python bench/regularization_cost.py [--steps 8] [--rows 16] [--only NAME ...]
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

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "l1": {"l1": 1e-6},
    "l2": {"l2": 1e-6},
    "r_drop": {"r_drop": {"alpha": 1.0}},
    "sam": {"sharpness": {"type": "sam"}},
    "asam": {"sharpness": {"type": "asam"}},
    "fgm": {"adversarial": {"type": "fgm"}},
    "pgd": {"adversarial": {"type": "pgd", "steps": 3}},
    "gradient_noise": {"gradient_noise": {"eta": 1e-6}},
    "max_norm": {"max_norm": {"value": 3.0}},
}


def built(settings: dict[str, Any], rows: int, cache: str) -> Contestant:
    source = {"path": "builtin:stdlib_docstrings", "format": "classification"}
    made = Recipe.model_validate(
        {
            "model": {"model_name_or_path": "builtin:minilm"},
            "data": {"train": [source], "max_length": 64, "cache_dir": cache},
            "objective": {"type": "classification"},
            "regularization": settings,
            "training": {"global_batch_size": rows, "per_device_train_batch_size": rows},
            "run_name": "bench",
        }
    )
    return contestant(made)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS)[1:])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as cache:
        runners = {name: built(SETTINGS[name], asked.rows, cache) for name in ["plain", *asked.only]}
        times = [{name: one.step(step) for name, one in runners.items()} for step in range(asked.steps + 1)][
            1:
        ]
    print(f"plain step: {statistics.median(row['plain'] for row in times):.2f} s")
    for name in asked.only:
        ratios = [row[name] / row["plain"] for row in times]
        print(f"{name:16s} {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
