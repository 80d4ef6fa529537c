"""The time of an optimizer step: ours beside a plain PyTorch loop on the same batches, and beside transformers.Trainer.

Everything runs in this one process, in turns, so that the machine's mood falls on all alike; the ratios count, not the
seconds. MiniLM-L6 classifies standard-library docstrings (the quickstart's data), 32 rows a step.

    python bench/step_time.py [--rounds 5] [--steps 8] [--precision fp32 bf16] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from tunesmith import optim
from tunesmith.data.prepare import prepare
from tunesmith.engine.single import SingleEngine
from tunesmith.loss_scale import LossScale
from tunesmith.model import load_model
from tunesmith.module import Precision, TrainModule
from tunesmith.objectives import build_objective
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
from tunesmith.step import train_step
from tunesmith.streams import build_stream
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash

ROWS, LEARNING_RATE, MAX_NORM = 32, 1e-4, 1.0


def recipe(precision: Precision, cache: str, group_by_length: bool = True) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "builtin:minilm"},
            "data": {
                "train": [{"path": "builtin:stdlib_docstrings", "format": "classification"}],
                "max_length": 64,
                "group_by_length": group_by_length,
                "cache_dir": cache,
            },
            "objective": {"type": "classification"},
            "optim": {"learning_rate": LEARNING_RATE, "weight_decay": 0.01},
            "training": {
                "global_batch_size": ROWS,
                "per_device_train_batch_size": ROWS,
                "precision": precision,
            },
            "run_name": "bench",
        }
    )


class Bench:
    """The three contestants on one data set, each with its own copy of the model."""

    def __init__(self, precision: Precision, cache: str) -> None:
        self.precision = precision
        settings = recipe(precision, cache)
        tokenizer, _ = tokenizer_for(settings, Path())
        objective = build_objective(settings, tokenizer)
        dataset = prepare(settings.data, Path(), objective, tokenizer_hash(tokenizer))["train"]
        # random windows for both loops: batches of like length are timed by the end-to-end comparison
        self.stream = build_stream(recipe(precision, cache, group_by_length=False), dataset, objective)
        self.objective, self.tokenizer, self.dataset = objective, tokenizer, dataset

        def model() -> Any:
            return load_model(settings.model, Path(), objective, tokenizer, 0).model.train()

        self.engine = SingleEngine(torch.device("cpu"))
        self.engine.prepare(
            TrainModule(model(), objective, precision).train(), lambda device: None, optim.Spec.of(settings)
        )
        self.plain = model()
        groups = optim.parameter_groups(self.plain, settings.optim)
        groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups]
        self.plain_optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
        self.trainer_model = model()
        self.scale, self.broken = LossScale(False, torch.device("cpu")), torch.zeros(())

    def ours(self, first: int, steps: int) -> list[float]:
        def step(number: int) -> None:
            train_step(
                self.engine, self.stream.batches(number, 0, 1, prefetch=False), self.objective.terms,
                step=number, seed=0, learning_rate=LEARNING_RATE, max_grad_norm=MAX_NORM,
                scale=self.scale, broken=self.broken, stop=False,
            )  # fmt: skip

        return _timed(step, first, steps)

    def loop(self, first: int, steps: int) -> list[float]:
        def step(number: int) -> None:
            (batch,) = self.stream.batches(number, 0, 1, prefetch=False)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
                logits = self.plain(**batch.inputs).logits
            F.cross_entropy(logits.float(), batch.targets["labels"]).backward()
            torch.nn.utils.clip_grad_norm_(self.plain.parameters(), MAX_NORM)
            self.plain_optimizer.step()
            self.plain_optimizer.zero_grad()

        return _timed(step, first, steps)

    def trainer(self, first: int, steps: int) -> list[float]:
        from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

        marks: list[float] = []

        class Clock(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                marks.append(time.perf_counter())

        rows = [int(row) for step in range(first, first + steps) for row in self.stream.window(step)]
        data = [
            {"input_ids": r["input_ids"].tolist(), "labels": int(r["labels"][0])}
            for r in (self.dataset.table.row(row) for row in rows)
        ]
        arguments = TrainingArguments(
            tempfile.mkdtemp(), per_device_train_batch_size=ROWS, max_steps=steps, learning_rate=LEARNING_RATE,
            weight_decay=0.01, bf16=self.precision == "bf16", use_cpu=True, save_strategy="no", report_to=[],
            disable_tqdm=True, logging_strategy="no", seed=0, train_sampling_strategy="sequential",
        )  # fmt: skip
        Trainer(
            self.trainer_model, arguments, train_dataset=data, data_collator=DataCollatorWithPadding(self.tokenizer),
            callbacks=[Clock()],
        ).train()  # fmt: skip
        # from one step's beginning to the next: with the making of the batch, as in the two loops
        return [end - begin for begin, end in pairwise(marks)]


def _timed(step: Callable[[int], None], first: int, steps: int) -> list[float]:
    times: list[float] = []
    for number in range(first, first + steps):
        started = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - started)
    return times


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    quiet_libraries()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for precision in given.precision:
            bench = Bench(precision, cache)
            contestants = {
                "tunesmith": bench.ours,
                "plain loop": bench.loop,
                "transformers.Trainer": bench.trainer,
            }
            for run in contestants.values():
                run(0, 2)  # first steps allocate
            medians: dict[str, list[float]] = {name: [] for name in contestants}
            for turn in range(given.rounds):
                for name, run in contestants.items():
                    medians[name].append(statistics.median(run(2 + turn * given.steps, given.steps)))
            ours = medians["tunesmith"]
            for name, times in medians.items():
                ratios = [a / b for a, b in zip(ours, times, strict=True)]
                ratio = statistics.median(ratios)
                found.setdefault(precision, {})[name] = ratio
                print(
                    f"{precision}  {name:21} {statistics.median(times) * 1e3:7.1f} ms a step   "
                    f"tunesmith takes {ratio:.3f} × of it (rounds {min(ratios):.3f} to {max(ratios):.3f})",
                    flush=True,
                )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
