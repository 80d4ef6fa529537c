"""What an average of the weights costs a step, and a swap of it an evaluation: CPU time on one thread, in turns with
the steps themselves. MiniLM-L6 classifies standard-library docstrings (the quickstart's data), 32 rows a step.

    python bench/average_cost.py [--steps 10]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tunesmith import optim
from tunesmith.averaging import average_among, build_average
from tunesmith.data.prepare import prepare
from tunesmith.engine.single import SingleEngine
from tunesmith.loss_scale import LossScale
from tunesmith.model import load_model
from tunesmith.module import TrainModule
from tunesmith.objectives import build_objective
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
from tunesmith.step import train_step
from tunesmith.streams import build_stream
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash


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


def measure(steps: int, cache: str) -> dict[str, float]:
    """Medians, in CPU seconds."""
    made, base = recipe(cache), Path()
    tokenizer, _ = tokenizer_for(made, base)
    objective = build_objective(made, tokenizer)
    data = prepare(made.data, base, objective, tokenizer_hash(tokenizer))["train"]
    stream = build_stream(made, data, objective)
    engine = SingleEngine(torch.device("cpu"))
    module = TrainModule(load_model(made.model, base, objective, tokenizer, 0).model, objective, "fp32")
    engine.prepare(module, lambda device: None, optim.Spec.of(made))
    settings = made.averaging
    assert settings is not None
    average = average_among(build_average(settings, module.model, 10_000, 100).steps)
    assert average is not None
    average.begin(engine, stream)
    times: dict[str, list[float]] = {"step": [], "update": [], "swap": []}
    zero = torch.zeros(())
    scale: Any = LossScale(False, engine.device)
    module.train()
    for step in range(steps):
        batches = stream.batches(step, 0, 1, prefetch=False)
        marks = [time.process_time()]
        train_step(
            engine, batches, module.terms, step=step, seed=0, learning_rate=1e-4, max_grad_norm=1.0,
            scale=scale, broken=zero, stop=False,
        )  # fmt: skip
        marks.append(time.process_time())
        average.after_step(step, zero)
        marks.append(time.process_time())
        with average.swapped():
            pass
        marks.append(time.process_time())
        for name, before, after in zip(times, marks[:-1], marks[1:], strict=True):
            times[name].append(after - before)
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as cache:
        found = measure(args.steps, cache)
    for name, seconds in found.items():
        print(f"{name}: {1000 * seconds:.1f} ms, {seconds / found['step']:.2%} of a step")


if __name__ == "__main__":
    main()
