"""The objectives as recipes, and what a run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tunesmith.data.order import Salt
from tunesmith.data.prepare import prepare
from tunesmith.data.stream import Stream
from tunesmith.objectives import build_objective
from tunesmith.recipe import Recipe
from tunesmith.streams import build_stream
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash
from tunesmith.tracking import metrics_file

TOLERANCE = 1e-5  # relative, fp32


@dataclass(frozen=True)
class Case:
    """One objective on one model; `file` is a kind of tiny_data."""

    name: str
    model: str
    file: str
    format: str
    objective: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict[str, Any])


CASES = {
    case.name: case
    for case in (
        Case("causal_lm", "llama", "text", "text", {"type": "causal_lm"}),
        Case("causal_lm_gpt2", "gpt2", "text", "text", {"type": "causal_lm"}),
        Case("sft", "llama", "chat", "messages", {"type": "sft"}),
        Case("masked_lm", "bert_mlm", "text", "text", {"type": "masked_lm"}),
        Case("next_sentence", "bert_nsp", "text", "text", {"type": "masked_lm", "next_sentence": True}),
        Case("span_corruption", "t5", "text", "text", {"type": "span_corruption"}),
        Case("single_label", "bert_single", "single", "classification", {"type": "classification"}),
        Case("multi_label", "bert_multi", "multi", "classification", {"type": "classification"}),
        Case("regression", "bert_regression", "number", "classification", {"type": "classification"}),
        Case("pairs", "bert_pairs", "pair", "pairs", {"type": "classification"}),
        Case("token_classification", "bert_tags", "tags", "tokens", {"type": "token_classification"}),
        Case(
            "question_answering", "bert_qa", "question", "squad",
            {"type": "question_answering", "doc_stride": 8}, {"max_length": 48},
        ),
        Case("seq2seq_t5", "t5", "translation", "translation", {"type": "seq2seq"}),
        Case("seq2seq_bart", "bart", "translation", "translation", {"type": "seq2seq"}),
    )
}  # fmt: skip

SGD: dict[str, Any] = {
    "optim": {"name": "sgd", "learning_rate": 0.05, "max_grad_norm": None},
    "schedule": {"lr_scheduler_type": "constant"},
}
"""Nothing between the gradient and the weights: a wrong scale of the gradient is a wrong step."""

SLOW_SGD: dict[str, Any] = {**SGD, "optim": {**SGD["optim"], "learning_rate": 0.01}}
"""For long runs: where a model has learnt its rows by heart, the loss is what rounding leaves of it."""

ADAMW: dict[str, Any] = {
    "optim": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.1},
    "schedule": {"lr_scheduler_type": "linear"},
}


@dataclass(frozen=True)
class Layout:
    """How the global batch of 16 is split."""

    micro_batch: int
    world_size: int = 1

    def __str__(self) -> str:
        return f"{self.world_size}x{self.micro_batch}"


WHOLE = Layout(16)
ACCUMULATED = Layout(2)  # 8 micro-batches
RANKS = Layout(4, world_size=2)  # 2 micro-batches on each of two ranks

TWO = Layout(4, world_size=2)
FOUR = Layout(2, world_size=4)
ALONE = Layout(8)

SHARDED: dict[str, dict[str, Any]] = {
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2"},
    "zero3": {"strategy": "zero3"},
    "fsdp2": {"strategy": "fsdp2"},
}
OFFLOADED: dict[str, dict[str, Any]] = {
    "zero1-offload": {"strategy": "zero1", "offload_optimizer": True},
    "zero2-offload": {"strategy": "zero2", "offload_optimizer": True},
    "zero3-offload": {"strategy": "zero3", "offload_optimizer": True, "offload_parameters": True},
    "fsdp2-offload": {"strategy": "fsdp2", "offload": True},
}
SPLIT = {"strategy": "fsdp2", "tensor_parallel_size": 2}
SHARED = {"strategy": "fsdp2", "sequence_parallel_size": 2}


@dataclass(frozen=True)
class Result:
    """A run's curve, one entry per step, and its last weights by name."""

    rows: list[dict[str, Any]]
    evaluation: dict[str, Any]
    facts: dict[str, Any]
    weights: dict[str, Tensor]
    run_dir: Path

    def curve(self, key: str) -> list[float]:
        return [row[key] for row in self.rows]


Run = Callable[..., Result]
TrainingRows = Callable[[int], list[dict[str, Any]]]


def recipe(
    workshop: Path, case: Case, optimizer: dict[str, Any], layout: Layout, steps: int, **sections: Any
) -> Recipe:
    """The recipe of a case. `sections` are merged over its own, section by section."""
    path = str(workshop / "data" / f"{case.file}.jsonl")
    source = {"path": path, "format": case.format}
    values: dict[str, Any] = {
        "model": {"model_name_or_path": str(workshop / "models" / case.model)},
        "data": {
            "train": [source],
            "max_length": 64,
            # whole windows of short rows beside windows of long ones would hide uneven units
            "group_by_length": False,
            "cache_dir": str(workshop / "cache"),
            **case.data,
        },
        "objective": case.objective,
        **optimizer,
        "training": {
            "max_steps": steps,
            "global_batch_size": 16,
            "per_device_train_batch_size": layout.micro_batch,
            "seed": 3,
        },
        "checkpoint": {"final": "last"},
        "tracking": {"logging_steps": 1, "progress": "off"},
        "output_dir": str(workshop / "runs"),
        "run_name": "unnamed",
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return Recipe.model_validate(values)


def open_stream(made: Recipe, base: Path) -> Stream:
    """The training stream of a recipe, as a run builds it."""
    tokenizer, _ = tokenizer_for(made, base)
    objective = build_objective(made, tokenizer)
    datasets = prepare(made.data, base, objective, tokenizer_hash(tokenizer))
    return build_stream(made, datasets["train"], objective)


def open_rows(made: Recipe, base: Path) -> TrainingRows:
    """step → the step's rows in the order of its window, with the masks and spans that are drawn for its epoch."""
    stream = open_stream(made, base)

    def rows(step: int) -> list[dict[str, Any]]:
        epoch, seed = stream.position(step).epoch, made.training.seed
        return [
            stream.objective.draw(stream.dataset.table.row(int(row)), (seed, epoch, int(row), Salt.ROW))
            for row in stream.window(step)
        ]

    return rows


def read_result(run_dir: Path) -> Result:
    rows = metrics_file.read(run_dir / "metrics.jsonl")
    about = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    return Result(
        [row for row in rows if "loss" in row],
        next((row for row in rows if "eval_loss" in row), {}),
        about["facts"],
        load_file(run_dir / "final" / "model.safetensors"),
        run_dir,
    )


def apart(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def weights_apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """‖a − b‖ / ‖b‖ of each tensor; 0 where the tensors are equal (BART has a buffer of zeros)."""
    assert a.keys() == b.keys()
    pairs = {name: (a[name].double(), b[name].double()) for name in b}
    return {name: 0.0 if x.equal(y) else float((x - y).norm() / y.norm()) for name, (x, y) in pairs.items()}


def assert_same_curves(found: Result, expected: Result) -> None:
    """Losses and gradient norms of every step within 1e-5; units and learning rates equal."""
    assert len(found.rows) == len(expected.rows) > 0
    assert found.curve("units") == expected.curve("units")
    assert found.curve("learning_rate") == expected.curve("learning_rate")
    for key in ("loss", "grad_norm"):
        pairs = zip(found.curve(key), expected.curve(key), strict=True)
        worst = max((apart(a, b), step) for step, (a, b) in enumerate(pairs, start=1))
        assert worst[0] <= TOLERANCE, f"{key} at step {worst[1]} differs by {worst[0]:.1e}"


def assert_same_weights(found: Result, expected: Result) -> None:
    worst = max(
        (difference, name) for name, difference in weights_apart(found.weights, expected.weights).items()
    )
    assert worst[0] <= TOLERANCE, f"{worst[1]} differs by {worst[0]:.1e}"
