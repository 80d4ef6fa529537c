"""What augmentation costs the stream: its rows per CPU second beside the plain run's.

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

from tunesmith.data.prepare import prepare
from tunesmith.data.stream import Stream
from tunesmith.objectives import build_objective
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
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


def built(arguments: argparse.Namespace, folder: Path, augment: list[dict[str, Any]]) -> Stream:
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
    return build_stream(recipe, datasets["train"], objective)


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
        rates: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(arguments.rounds):
            for name, stream in made.items():
                started = time.process_time()
                for step in range(ROWS // BATCH):
                    stream.batches(step, 0, 1, prefetch=False)
                rates[name].append(ROWS / (time.process_time() - started))
    plain = statistics.median(rates["plain"])
    print(f"{'':<14}{'rows/s':>10}{'of plain':>10}")
    for name in made:
        rate = statistics.median(rates[name])
        print(f"{name:<14}{rate:>10,.0f}{rate / plain:>10.2f}")


if __name__ == "__main__":
    main()
