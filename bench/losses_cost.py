"""What a loss costs a step beside the objective's own: CPU time on one thread, in turns with the plain step. MiniLM-L6
classifies 600 standard-library docstrings, 32 rows a step; a small Llama with a vocabulary of
32,000 learns from sources, by the fused cross-entropy and by focal from whole logits.

    python bench/losses_cost.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from contestant import compare as in_turns

from tunesmith import optim
from tunesmith.data.prepare import prepare
from tunesmith.engine.single import SingleEngine
from tunesmith.fused_head import FusedHead
from tunesmith.fusing import choose_head
from tunesmith.loss_scale import LossScale
from tunesmith.model import load_model
from tunesmith.module import TrainModule
from tunesmith.objectives import build_objective
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
from tunesmith.step import train_step
from tunesmith.streams import build_stream
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash

ROW_LOSSES: tuple[Any, ...] = (
    {"type": "cross_entropy", "class_weights": "auto"},
    {"type": "binary_cross_entropy", "pos_weight": "auto"},
    "focal", "class_balanced", "ldam", "ordinal", {"type": "ordinal", "method": "emd"},
)  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128, "vocab_size": 32_000,
}  # fmt: skip


def classifier(cache: str, loss: Any) -> Recipe:
    source = {"path": "builtin:stdlib_docstrings", "format": "classification", "limit": 600}
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "builtin:minilm"},
            "data": {"train": [source], "max_length": 64, "cache_dir": cache},
            "objective": {"type": "classification", "loss": loss},
            "training": {"global_batch_size": 32, "per_device_train_batch_size": 32},
            "run_name": "bench",
        }
    )


def language_model(cache: str, loss: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"init": "from_config", "config": LLAMA, "tokenizer": "builtin:minilm"},
            "data": {
                "train": [
                    {"path": "builtin:stdlib_docstrings", "format": "text", "columns": {"text": "text"}}
                ],
                "max_length": 64,
                "cache_dir": cache,
            },
            "objective": {"type": "causal_lm", "loss": loss},
            "training": {"global_batch_size": 8, "per_device_train_batch_size": 8},
            "run_name": "bench",
        }
    )


class Contestant:
    """A loss with a model of its own."""

    def __init__(self, made: Recipe) -> None:
        base = Path()
        tokenizer, _ = tokenizer_for(made, base)
        objective = build_objective(made, tokenizer)
        data = prepare(made.data, base, objective, tokenizer_hash(tokenizer))["train"]
        self.stream = build_stream(made, data, objective)
        self.engine = SingleEngine(torch.device("cpu"))
        model = load_model(made.model, base, objective, tokenizer, 0).model
        head = choose_head(made, model, objective)
        self.module = TrainModule(model, objective, "fp32")
        self.engine.prepare(self.module, lambda device: None, optim.Spec.of(made))
        self.module.fused_head = head if isinstance(head, FusedHead) else None
        self.module.train()

    def step(self, number: int) -> float:
        """CPU seconds."""
        batches = self.stream.batches(number, 0, 1, prefetch=False)
        started = time.process_time()
        train_step(
            self.engine, batches, self.module.terms, step=number, seed=0, learning_rate=1e-5, max_grad_norm=1.0,
            scale=LossScale(False, self.engine.device), broken=torch.zeros(()), stop=False,
        )  # fmt: skip
        return time.process_time() - started


def compare(names: list[Any], make: Any, cache: str, rounds: int) -> None:
    contestants = {str(name): Contestant(make(cache, name)) for name in (None, *names)}
    in_turns(contestants, "None", rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        compare(list(ROW_LOSSES), classifier, cache, rounds)
        compare(["focal"], language_model, cache, rounds)


if __name__ == "__main__":
    main()
