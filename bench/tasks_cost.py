"""What several tasks, and the balancing of their losses, cost a step: CPU time on one thread, all in turns. MiniLM-L6
on standard-library docstrings (the quickstart's data), as one task, and as three that each take a third of the rows;
rows are cut to 32 tokens, which most have, so that windows of other rows are of like size.

    python bench/tasks_cost.py [--steps 8] [--rows 24]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith import optim
from tunesmith.assemble import assemble
from tunesmith.data.stream import Stream
from tunesmith.engine.single import SingleEngine
from tunesmith.loss_scale import LossScale
from tunesmith.module import TrainModule
from tunesmith.objectives import build_objective
from tunesmith.parts import Strategies
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
from tunesmith.run import build_stream
from tunesmith.startup import probe
from tunesmith.step import train_step
from tunesmith.strategies import Building, build_strategies
from tunesmith.tasks.prepare import prepare_rows
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash

BALANCING = ("fixed", "uncertainty", "dwa", "gradnorm")


@dataclass
class Contestant:
    engine: SingleEngine
    stream: Stream
    strategies: Strategies

    def step(self, step: int) -> float:
        """CPU seconds."""
        engine = self.engine
        batches = self.stream.batches(step, 0, 1, prefetch=False)
        scale: Any = LossScale(False, engine.device)
        started = time.process_time()
        for part in self.strategies.steps:
            part.open(step)
        train_step(
            engine, batches, engine.train_module.terms, step=step, seed=0, learning_rate=1e-4, max_grad_norm=1.0,
            scale=scale, broken=torch.zeros(()), stop=False, strategies=self.strategies,
        )  # fmt: skip
        return time.process_time() - started


def contestant(balancing: str | None, rows: int, cache: str) -> Contestant:
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
    base, engine = Path(), SingleEngine(torch.device("cpu"))
    tokenizer, _ = tokenizer_for(made, base)
    objective = build_objective(made, tokenizer)
    datasets = prepare_rows(made, base, objective, tokenizer_hash(tokenizer), engine.device)
    built = assemble(made, base, objective, tokenizer, engine.device, empty=False)
    stream = build_stream(made, datasets["train"], objective)
    found = build_strategies(
        Building(made, base, built, objective, tokenizer, datasets, stream, 100, engine.device)
    )
    module = TrainModule(built.model, objective, "fp32", found.terms, found.forward)
    engine.prepare(module, built.fill, optim.Spec.of(made))
    for part in found.forward:
        part.begin(engine)
    for part in found.steps:
        part.begin(engine, stream)
    probe(engine, stream)
    engine.module.train()
    return Contestant(engine, stream, found)


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
        runners = {name or "one task": contestant(name, asked.rows, cache) for name in (None, *BALANCING)}
        times = [{name: one.step(step) for name, one in runners.items()} for step in range(asked.steps + 1)]
    print(f"one task: {statistics.median(row['one task'] for row in times[1:]):.2f} s")
    for name, plain in (("fixed", "one task"), *((name, "fixed") for name in BALANCING[1:])):
        ratios = [row[name] / row[plain] for row in times[1:]]
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:12s} {statistics.median(ratios):.2f} of {plain}  {spread}")


if __name__ == "__main__":
    main()
