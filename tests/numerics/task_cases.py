"""Three tasks on a tiny backbone: tags on words, a label of a text, masked words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tunesmith.recipe import Recipe
from tunesmith.tracking import metrics_file

NAMES = ("tags", "topic", "words")


def task(workshop: Path, file: str, format: str, objective: str, **settings: Any) -> dict[str, Any]:
    return {
        "data": {
            "train": [{"path": str(workshop / "data" / f"{file}.jsonl"), "format": format}],
            "split": {"eval": 0.25},
            "max_length": 64,
            "group_by_length": False,
        },
        "objective": {"type": objective},
        **settings,
    }


def tasks_recipe(workshop: Path, name: str, rows: int = 16, steps: int = 6, **sections: Any) -> Recipe:
    """SGD on windows of 16, `rows` to a forward."""
    values: dict[str, Any] = {
        "model": {"model_name_or_path": str(workshop / "models" / "bert_mlm")},
        "tasks": {
            "tags": task(workshop, "tags", "tokens", "token_classification"),
            "topic": task(workshop, "single", "classification", "classification", weight=0.5),
            "words": task(workshop, "text", "text", "masked_lm"),
        },
        "optim": {"name": "sgd", "learning_rate": 0.05, "max_grad_norm": None},
        "schedule": {"lr_scheduler_type": "constant"},
        "training": {
            "max_steps": steps,
            "global_batch_size": 16,
            "per_device_train_batch_size": rows,
            "precision": "fp32",
            "seed": 3,
        },
        "evaluation": {"eval_steps": 3},
        "checkpoint": {"save_steps": 3, "save_total_limit": None, "final": "last"},
        "tracking": {"logging_steps": 1, "progress": "off"},
        "output_dir": str(workshop / "runs"),
        "run_name": name,
    }
    for key, section in sections.items():
        whole = key == "tasks" or not isinstance(section, dict)
        values[key] = section if whole else {**values.get(key, {}), **section}
    return Recipe.model_validate(values)


def folder(made: Recipe) -> Path:
    return Path(made.output_dir) / made.run_name


def training(made: Recipe) -> list[dict[str, Any]]:
    return [row for row in metrics_file.read(folder(made) / "metrics.jsonl") if "loss" in row]


def evaluations(made: Recipe) -> list[dict[str, Any]]:
    return [row for row in metrics_file.read(folder(made) / "metrics.jsonl") if "eval_loss" in row]


def finals(made: Recipe) -> dict[str, dict[str, Tensor]]:
    found = sorted((folder(made) / "final").iterdir())
    return {one.name: load_file(one / "model.safetensors") for one in found}
