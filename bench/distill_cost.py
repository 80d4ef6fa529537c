"""What a teacher costs a step: CPU time on one thread, in turns with the plain step. MiniLM-L6 teaches a student of its
own 3 layers on 600 standard-library docstrings, 32 rows a step; a Llama of 8 layers teaches one of 4, both with a
vocabulary of 30,522, 8 rows of at most 64 tokens a step.

    python bench/distill_cost.py [--rounds 7]
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
from tunesmith.assemble import assemble
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
from tunesmith.strategies import Building, build_strategies
from tunesmith.streams import build_stream
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash

LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128, "vocab_size": 30_522,
}  # fmt: skip
LARGER = {**LLAMA, "num_hidden_layers": 8}

CLASSIFIER: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "logits": {},
    "logits and hidden": {"losses": [{"type": "logits"}, {"type": "hidden"}]},
    "embedding": {"losses": [{"type": "embedding"}]},
}
LANGUAGE: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "logits": {},
    "logits, whole": {},
    "logits, top 32": {"losses": [{"type": "logits", "top_k": 32}]},
    "offline, top 32": {"offline": {"top_k": 32}},
}


def recipe(cache: str, kind: str, name: str, distill: dict[str, Any] | None, larger: bool = False) -> Recipe:
    classifies = kind == "classification"
    columns = {} if classifies else {"columns": {"text": "text"}}
    source = {
        "path": "builtin:stdlib_docstrings",
        "format": kind if classifies else "text",
        "limit": 600,
        **columns,
    }
    model: dict[str, Any] = {"model_name_or_path": "builtin:minilm"}
    if not classifies:
        model = {"init": "from_config", "config": LARGER if larger else LLAMA, "tokenizer": "builtin:minilm"}
    elif not larger:
        model["config"] = {"num_hidden_layers": 3}
    teacher = (
        {} if distill is None else {"distill": {"teacher_model_name_or_path": f"{cache}/{kind}", **distill}}
    )
    return Recipe.model_validate(
        {
            "model": model,
            "data": {"train": [source], "max_length": 64, "cache_dir": cache},
            "objective": {"type": kind},
            "training": dict.fromkeys(
                ("global_batch_size", "per_device_train_batch_size"), 32 if classifies else 8
            ),
            "kernels": "reference" if name.endswith("whole") else "auto",
            "run_name": "bench",
            **teacher,
        }
    )


def save_teacher(cache: str, kind: str) -> None:
    made = recipe(cache, kind, "", None, larger=True)
    tokenizer, _ = tokenizer_for(made, Path())
    objective = build_objective(made, tokenizer)
    prepare(made.data, Path(), objective, tokenizer_hash(tokenizer))
    load_model(made.model, Path(), objective, tokenizer, 1).model.save_pretrained(f"{cache}/{kind}")
    tokenizer.save_pretrained(f"{cache}/{kind}")


class Contestant:
    """A way to learn, with a student of its own."""

    def __init__(self, made: Recipe) -> None:
        base, device = Path(), torch.device("cpu")
        tokenizer, _ = tokenizer_for(made, base)
        objective = build_objective(made, tokenizer)
        datasets = prepare(made.data, base, objective, tokenizer_hash(tokenizer))
        self.stream = build_stream(made, datasets["train"], objective)
        built = assemble(made, base, objective, tokenizer, device)
        self.strategies = build_strategies(
            Building(made, base, built, objective, tokenizer, datasets, self.stream, 100, device)
        )
        head = choose_head(made, built.model, objective)
        self.engine = SingleEngine(device)
        self.module = TrainModule(
            built.model, objective, "fp32", self.strategies.terms, self.strategies.forward
        )
        self.engine.prepare(self.module, lambda device: None, optim.Spec.of(made))
        for part in self.strategies.forward:
            part.begin(self.engine)
        self.module.fused_head = head if isinstance(head, FusedHead) else None
        self.module.train()

    def step(self, number: int) -> float:
        """CPU seconds."""
        batches = self.stream.batches(number, 0, 1, prefetch=False)
        started = time.process_time()
        train_step(
            self.engine, batches, self.module.terms, step=number, seed=0, learning_rate=1e-5, max_grad_norm=1.0,
            scale=LossScale(False, self.engine.device), broken=torch.zeros(()), stop=False,
            strategies=self.strategies,
        )  # fmt: skip
        return time.process_time() - started


def compare(kind: str, ways: dict[str, dict[str, Any] | None], cache: str, rounds: int) -> None:
    save_teacher(cache, kind)
    contestants = {name: Contestant(recipe(cache, kind, name, way)) for name, way in ways.items()}
    in_turns(contestants, "plain", rounds, f"{kind}, ")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        compare("classification", CLASSIFIER, cache, rounds)
        compare("causal_lm", LANGUAGE, cache, rounds)


if __name__ == "__main__":
    main()
