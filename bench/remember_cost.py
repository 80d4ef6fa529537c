"""What the ways to remember cost a step. MiniLM-L6 goes on from a run on standard-library docstrings; `auxiliary` has
half as many rows more of the same text, with masked words. Time: CPU time on one thread, in turns with the plain step.
Memory: the peak of a process of its own for each way, less that of the plain one, after three steps.

    python bench/remember_cost.py [--steps 8] [--rows 16]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tunesmith import optim
from tunesmith.assemble import assemble
from tunesmith.data.stream import Stream
from tunesmith.engine.single import SingleEngine
from tunesmith.loss_scale import LossScale
from tunesmith.memory import peak_memory_bytes
from tunesmith.module import TrainModule
from tunesmith.objectives import build_objective
from tunesmith.parts import Strategies
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
from tunesmith.run import Resume, build_stream, run
from tunesmith.startup import probe
from tunesmith.step import train_step
from tunesmith.strategies import Building, build_strategies
from tunesmith.tasks.prepare import prepare_rows
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "l2_sp": {"l2_sp": {}},
    "anchor": {"anchor": {}},
    "ewc": {"ewc": {"rows": 50}},
    "lwf": {"lwf": {}},
    "wise_ft": {"wise_ft": {}},
    "auxiliary": {},
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


def contestant(name: str, rows: int, folder: str) -> Contestant:
    old = {"model": {"model_name_or_path": f"{folder}/old/final"}}
    if name == "auxiliary":
        made = auxiliary(folder, rows)
    elif name == "plain":
        made = recipe(folder, rows, "bench", **old)
    else:
        made = recipe(folder, rows, "bench", **old, remember={"run": f"{folder}/old", **SETTINGS[name]})
    base, engine = Path(), SingleEngine(torch.device("cpu"))
    tokenizer, _ = tokenizer_for(made, base)
    objective = build_objective(made, tokenizer)
    datasets = prepare_rows(made, base, objective, tokenizer_hash(tokenizer), engine.device)
    stream = build_stream(made, datasets["train"], objective)
    built = assemble(made, base, objective, tokenizer, engine.device, empty=False)
    found = build_strategies(
        Building(made, base, built, objective, tokenizer, datasets, stream, 100, engine.device)
    )
    module = TrainModule(built.model, objective, "fp32", found.terms, found.forward)
    engine.prepare(module, built.fill, optim.Spec.of(made))
    for part in found.forward:
        part.begin(engine)
    for part in found.steps:
        part.begin(engine, stream)
    probe(engine, stream)  # finds what a task's step does not use
    engine.module.train()
    return Contestant(engine, stream, found)


def peak(name: str, rows: int, folder: str) -> int:
    torch.set_num_threads(1)
    quiet_libraries()
    one = contestant(name, rows, folder)
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
        runners = {name: contestant(name, asked.rows, folder) for name in SETTINGS}
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
