"""What augmentation costs: rows per second of the stream, and the time of a step, beside the plain run.

    python bench/augmentation.py --data train.csv [--model builtin:minilm] [--rounds 5]

One process, one thread; the variants take turns, and the ratio is that of the medians."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tunesmith.assemble import assemble
from tunesmith.data.prepare import prepare
from tunesmith.data.stream import Stream
from tunesmith.embedding_noise.cutoff import Cutoff
from tunesmith.embedding_noise.hook import EmbeddingNoise, ways_of_reading
from tunesmith.embedding_noise.mixup import MixedTerm, mix
from tunesmith.module import TrainModule
from tunesmith.objectives import build_objective
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
from tunesmith.recipe import augment as settings
from tunesmith.streams import build_stream
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash

ROWS, BATCH = 640, 32
OPERATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [],
    "token_mask": [{"type": "token_mask", "probability": 1.0}],
    "token_drop": [{"type": "token_drop", "probability": 1.0}],
    "token_swap": [{"type": "token_swap", "fraction": 0.1, "probability": 1.0}],
    "token_insert": [{"type": "token_insert", "probability": 1.0}],
    "synonyms": [{"type": "synonyms", "table": "TABLE", "probability": 1.0}],
    "cutoff": [{"type": "cutoff", "probability": 1.0}],
    "mixup": [{"type": "mixup", "alpha": 0.4}],
}


def built(
    arguments: argparse.Namespace, folder: Path, augment: list[dict[str, Any]]
) -> tuple[Recipe, Stream]:
    table = folder / "synonyms.tsv"
    table.write_text("card\tpass\nmy\tthe\ni\twe\nhow\twhy\n", encoding="utf-8")
    augment = [{**one, "table": str(table)} if "table" in one else one for one in augment]
    source = {
        "path": str(arguments.data.resolve()),
        "format": "classification",
        "columns": {"text": "text", "label": arguments.label},
        "limit": 2000,
    }
    recipe = Recipe.model_validate(
        {
            "model": {"model_name_or_path": arguments.model},
            "data": {"train": [source], "max_length": 64, "cache_dir": str(folder), "augment": augment},
            "objective": {"type": "classification"},
            "training": {"global_batch_size": BATCH, "per_device_train_batch_size": BATCH},
            "run_name": "bench",
        }
    )
    tokenizer, _ = tokenizer_for(recipe, Path())
    objective = build_objective(recipe, tokenizer)
    datasets = prepare(recipe.data, Path(), objective, tokenizer_hash(tokenizer))
    return recipe, build_stream(recipe, datasets["train"], objective)


def module_of(recipe: Recipe, stream: Stream, model: Any) -> TrainModule:
    changes: list[Any] = []
    for number, one in enumerate(recipe.data.augment):
        if isinstance(one, settings.Mixup):
            changes.append(mix)
        if isinstance(one, settings.Cutoff):
            changes.append(Cutoff(one, number, tuple(stream.objective.tokenizer.all_special_ids), False))
    parts = [EmbeddingNoise(changes)] if changes else []
    for part in parts:
        part.attach(*ways_of_reading(model))
    own = MixedTerm if mix in changes else None
    return TrainModule(model, stream.objective, "fp32", (), parts, own)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--label", default="category")
    parser.add_argument("--model", default="builtin:minilm")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        made = {name: built(arguments, Path(folder), augment) for name, augment in OPERATIONS.items()}
        recipe, stream = made["plain"]
        model: Any = assemble(
            recipe, Path(), stream.objective, stream.objective.tokenizer, torch.device("cpu")
        ).model
        modules = {name: module_of(*pair, model) for name, pair in made.items()}
        rates: dict[str, list[float]] = {name: [] for name in made}
        steps: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(arguments.rounds):
            for name, (_, stream) in made.items():
                started = time.perf_counter()
                for step in range(ROWS // BATCH):
                    (batch,) = stream.batches(step, 0, 1, prefetch=False)
                rates[name].append(ROWS / (time.perf_counter() - started))
                started = time.perf_counter()
                for step in (0, 1):
                    (batch,) = stream.batches(step, 0, 1, prefetch=False)
                    modules[name](batch, "loss", torch.tensor([float(BATCH)])).total.backward()
                steps[name].append((time.perf_counter() - started) / 2)
                model.zero_grad()
    plain, usual = statistics.median(rates["plain"]), statistics.median(steps["plain"])
    print(f"{'':<14}{'rows/s':>10}{'of plain':>10}{'step':>10}{'of plain':>10}")
    for name in made:
        rate, seconds = statistics.median(rates[name]), statistics.median(steps[name])
        print(f"{name:<14}{rate:>10,.0f}{rate / plain:>10.2f}{seconds:>9.3f}s{seconds / usual:>10.2f}")


if __name__ == "__main__":
    main()
