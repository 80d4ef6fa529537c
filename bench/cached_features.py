"""An epoch of training a head behind a frozen backbone: with cached features beside without, on the same batches.

MiniLM-L6 and the 77 intents of banking77 (TUNESMITH_DATA names the folder of the data sets). Epochs are timed in turns
in this one process, so that the machine's mood falls on both; losses and weights are compared step by step.

    python bench/cached_features.py [--epochs 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tunesmith import optim
from tunesmith.data.prepare import prepare
from tunesmith.engine.single import SingleEngine
from tunesmith.features import cache_features
from tunesmith.loss_scale import LossScale
from tunesmith.model import load_model
from tunesmith.module import TrainModule
from tunesmith.objectives import build_objective
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
from tunesmith.step import train_step
from tunesmith.streams import build_stream
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash

ROWS, LEARNING_RATE = 32, 1e-2


def recipe(cache: str) -> Recipe:
    source = {
        "path": str(Path(os.environ["TUNESMITH_DATA"]) / "banking77" / "train.csv"),
        "format": "classification",
        "columns": {"text": "text", "label": "category"},
    }
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "builtin:minilm"},
            "data": {"train": [source], "max_length": 64, "cache_dir": cache},
            "objective": {"type": "classification"},
            "trainable": {"freeze": ["backbone"], "cache_features": True},
            "optim": {"learning_rate": LEARNING_RATE, "weight_decay": 0.01},
            "training": {
                "global_batch_size": ROWS,
                "per_device_train_batch_size": ROWS,
                "precision": "fp32",
            },
            "run_name": "bench",
        }
    )


class Contestant:
    """A model of its own with the same first weights."""

    def __init__(self, settings: Recipe) -> None:
        self.settings = settings
        tokenizer, _ = tokenizer_for(settings, Path())
        self.objective = build_objective(settings, tokenizer)
        self.datasets = prepare(settings.data, Path(), self.objective, tokenizer_hash(tokenizer))
        self.stream = build_stream(settings, self.datasets["train"], self.objective)
        self.model: Any = load_model(settings.model, Path(), self.objective, tokenizer, 0).model
        self.model.base_model.requires_grad_(False)
        self.engine = SingleEngine(torch.device("cpu"))
        self.engine.prepare(
            TrainModule(self.model, self.objective, "fp32").train(),
            lambda device: None,
            optim.Spec.of(settings),
        )
        self.scale, self.broken = LossScale(False, torch.device("cpu")), torch.zeros(())

    def cache(self) -> dict[str, Any]:
        return cache_features(self.engine, self.settings, self.objective, self.datasets)

    def epoch(self, number: int) -> tuple[float, list[float]]:
        """Seconds, and the loss of each step."""
        self.engine.module.train()
        self.model.base_model.eval()
        losses: list[torch.Tensor] = []
        started = time.perf_counter()
        for step in range(number * self.stream.steps_per_epoch, (number + 1) * self.stream.steps_per_epoch):
            result = train_step(
                self.engine, self.stream.batches(step, 0, 1, prefetch=True), self.objective.terms,
                step=step, seed=0, learning_rate=LEARNING_RATE, max_grad_norm=1.0,
                scale=self.scale, broken=self.broken, stop=False,
            )  # fmt: skip
            losses.append(result.loss)
        return time.perf_counter() - started, [float(loss) for loss in losses]

    def head(self) -> list[torch.Tensor]:
        return [p.detach() for p in self.model.parameters() if p.requires_grad]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as cache:
        cached, whole = Contestant(recipe(cache)), Contestant(recipe(cache))
        facts = cached.cache()
        ratios: list[float] = []
        loss_apart = 0.0
        for epoch in range(given.epochs):
            (fast, ours), (slow, theirs) = cached.epoch(epoch), whole.epoch(epoch)
            ratios.append(slow / fast)
            loss_apart = max(
                loss_apart, *(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(ours, theirs, strict=True))
            )
            print(
                f"epoch {epoch + 1}: {fast:.2f} s with cached features, {slow:.2f} s without: {slow / fast:.1f} × "
                f"faster; last loss {ours[-1]:.6f} and {theirs[-1]:.6f}",
                flush=True,
            )
        weights_apart = max(
            float((a - b).abs().max() / b.abs().max())
            for a, b in zip(cached.head(), whole.head(), strict=True)
        )
    found = {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "computing_seconds": facts["cached_features_seconds"],
        "bytes": facts["cached_features_bytes"],
        "features_difference": facts["cached_features_difference"],
        "loss_difference": loss_apart,
        "head_difference": weights_apart,
    }
    for name, value in found.items():
        print(f"{name}: {value}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
