"""What the exchange of weights and average around an evaluation costs, in steps: CPU time on one thread. MiniLM-L6
classifies standard-library docstrings (the quickstart's data), 32 rows a step.

    python bench/average_cost.py [--steps 10]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from contestant import contestant

from tunesmith.averaging import average_among
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe


def recipe(cache: str) -> Recipe:
    source = {"path": "builtin:stdlib_docstrings", "format": "classification"}
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "builtin:minilm"},
            "data": {"train": [source], "max_length": 64, "cache_dir": cache},
            "objective": {"type": "classification"},
            "averaging": {"type": "ema"},
            "training": {"global_batch_size": 32, "per_device_train_batch_size": 32},
            "run_name": "bench",
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as cache:
        one = contestant(recipe(cache))
        average = average_among(one.strategies.steps)
        assert average is not None
        steps, exchanges = [], []
        for step in range(args.steps):
            steps.append(one.step(step))
            started = time.process_time()
            with average.swapped():
                pass
            exchanges.append(time.process_time() - started)
    step, exchange = statistics.median(steps[2:]), statistics.median(exchanges[2:])
    print(
        f"step: {1000 * step:.1f} ms; exchange, there and back: {1000 * exchange:.1f} ms, {exchange / step:.2%}"
    )


if __name__ == "__main__":
    main()
