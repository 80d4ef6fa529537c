"""What each kind of `regularization` costs a step: CPU time on one thread, the plain step and all others in turns, on
the same rows. MiniLM-L6 classifies standard-library docstrings (the quickstart's data).

    python bench/regularization_cost.py [--steps 8] [--rows 16] [--only NAME ...]
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

from tunesmith import optim, regularization
from tunesmith.assemble import assemble
from tunesmith.data.prepare import prepare
from tunesmith.data.stream import Stream
from tunesmith.engine.single import SingleEngine
from tunesmith.loss_scale import LossScale
from tunesmith.module import TrainModule
from tunesmith.objectives import build_objective
from tunesmith.parts import Strategies
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
from tunesmith.run import build_stream
from tunesmith.step import train_step
from tunesmith.strategies import Building
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash

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
        train_step(
            engine, batches, engine.train_module.terms, step=step, seed=0, learning_rate=1e-4, max_grad_norm=1.0,
            scale=scale, broken=torch.zeros(()), stop=False, strategies=self.strategies,
        )  # fmt: skip
        return time.process_time() - started


def contestant(settings: dict[str, Any], rows: int, cache: str) -> Contestant:
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
    base, engine = Path(), SingleEngine(torch.device("cpu"))
    tokenizer, _ = tokenizer_for(made, base)
    objective = build_objective(made, tokenizer)
    datasets = prepare(made.data, base, objective, tokenizer_hash(tokenizer))
    stream = build_stream(made, datasets["train"], objective)
    built = assemble(made, base, objective, tokenizer, engine.device, empty=False)
    found = regularization.build(
        Building(made, base, built, objective, tokenizer, datasets, stream, 100, engine.device)
    )
    engine.prepare(
        TrainModule(built.model, objective, "fp32", found.terms, found.forward),
        built.fill,
        optim.Spec.of(made),
    )
    for part in found.forward:
        part.begin(engine)
    for part in found.steps:
        part.begin(engine, stream)
    engine.module.train()
    return Contestant(engine, stream, found)


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
        runners = {name: contestant(SETTINGS[name], asked.rows, cache) for name in ["plain", *asked.only]}
        times = [{name: one.step(step) for name, one in runners.items()} for step in range(asked.steps + 1)][
            1:
        ]
    print(f"plain step: {statistics.median(row['plain'] for row in times):.2f} s")
    for name in asked.only:
        ratios = [row[name] / row["plain"] for row in times]
        print(f"{name:16s} {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
