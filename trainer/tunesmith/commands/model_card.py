"""README.md of an exported model: the facts of its training, read from the run's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith import __version__
from tunesmith.commands.finished import FinishedRun
from tunesmith.recipe import Recipe
from tunesmith.run import best_metric
from tunesmith.tracking.metrics_file import Row, read
from tunesmith.tracking.text import number

_TASKS = {
    "classification": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "seq2seq": "text2text-generation",
    "causal_lm": "text-generation",
    "sft": "text-generation",
    "masked_lm": "fill-mask",
    "span_corruption": "text2text-generation",
}


def model_card(run: FinishedRun, name: str, dtype: str) -> str:
    """Markdown with the metadata block that model hubs read. Of local files only the names are told."""
    path = run.run_dir / "environment.json"
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    recipe, facts = run.recipe, about.get("facts", {})
    objective = recipe.objective
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {_TASKS[objective.type]}",
        "tags: [tunesmith]",
        *_base_metadata(read_base(run)),
        "---",
        "",
        f"# {name}",
        "",
        f"Made with tunesmith {__version__} from the run `{recipe.run_name}` ({run.weights}, saved as {dtype}).",
        "",
        f"- Base model: {_base(read_base(run))}",
        f"- Class: {type(run.model).__name__}, {sum(p.numel() for p in run.model.parameters()):,} parameters",
        f"- Objective: {objective.type}",
        f"- Longest input in training: {recipe.data.max_length} tokens",
        *_labels(run),
        "",
        "## Data",
        "",
        *_data(recipe, {split: own.get(run.task, own) for split, own in facts.get("data", {}).items()}),
        "",
        "## Training",
        "",
        *_training(recipe, facts),
        "",
        "## Results",
        "",
        *_results(run),
        "",
        "## Versions",
        "",
        *(f"- {package} {version}" for package, version in about.get("versions", {}).items()),
    ]
    return "\n".join(lines) + "\n"


def read_base(run: FinishedRun) -> str | None:
    """What the run began from, None where from nothing."""
    model = run.recipe.model
    return None if model.init == "from_config" else model.model_name_or_path


def _base_metadata(base: str | None) -> list[str]:
    is_hub_id = base is not None and not base.startswith("builtin:") and not Path(base).is_absolute()
    return [f"base_model: {base}"] if is_hub_id else []


def _base(base: str | None) -> str:
    if base is None:
        return "none (random initial weights)"
    return Path(base).name if Path(base).is_absolute() else base


def _labels(run: FinishedRun) -> list[str]:
    labels = run.objective.state().get("labels") or []
    some = ", ".join(labels[:20]) + (f" and {len(labels) - 20} more" if len(labels) > 20 else "")
    return [f"- Labels ({len(labels)}): {some}"] if labels else []


def _data(recipe: Recipe, facts: dict[str, Any]) -> Iterator[str]:
    for split in ("train", "eval", "test"):
        sources = [_source(source.path) for source in getattr(recipe.data, split)]
        about = facts.get(split)
        if about is None and not sources:
            continue
        rows = "" if about is None else f": {about['rows']:,} rows, {about['tokens']:,} tokens"
        origin = ", ".join(sources) if sources else "taken out of the training files"
        yield f"- {split}{rows} ({origin})"


def _source(path: str) -> str:
    return path if path.startswith(("hub:", "builtin:")) else Path(path).name


def _training(recipe: Recipe, facts: dict[str, Any]) -> Iterator[str]:
    optim, training = recipe.optim, recipe.training
    steps = facts.get("total_steps")
    length = f"{training.max_steps} steps" if training.max_steps else f"{training.epochs:g} epochs"
    yield f"- {length}" + (f" ({steps:,} steps)" if steps and not training.max_steps else "")
    yield f"- {training.global_batch_size} rows a step, seed {training.seed}"
    yield (
        f"- {optim.name}, learning rate {optim.learning_rate:g}, weight decay {optim.weight_decay:g}, "
        f"{recipe.schedule.lr_scheduler_type} schedule"
    )
    for teacher in facts.get("distill", {}).get("teachers", []):
        yield f"- distilled from {teacher['name']} ({teacher['class']}), alpha {facts['distill']['alpha']:g}"
    precision = facts.get("precision", training.precision)
    yield f"- precision {precision}, {facts.get('engine', 'single')} on {facts.get('world_size', 1)} process(es)"


def _results(run: FinishedRun) -> Iterator[str]:
    """The test of the final weights, else the evaluation that they come from."""
    path = run.run_dir / "metrics.jsonl"
    split, row = _measured(run, read(path) if path.is_file() else [])
    if row is None:
        yield "The run measured nothing on these weights."
        return
    yield "| metric | value |"
    yield "|---|---:|"
    for key, value in row.items():
        if key.startswith(f"{split}_") and key != f"{split}_seconds" and value is not None:
            yield f"| {key} | {number(value)} |"


def _measured(run: FinishedRun, rows: list[Row]) -> tuple[str, Row | None]:
    evaluations = [row for row in rows if "eval_loss" in row]
    if run.weights != "final":
        of_step = (row for row in evaluations if run.weights == f"checkpoint-{row['step']}")
        return "eval", next(of_step, None)
    test = next((row for row in reversed(rows) if "test_loss" in row), None)
    if test is not None or not evaluations:
        return "test", test
    if run.recipe.checkpoint.final == "last":
        return "eval", evaluations[-1]
    name, greater = best_metric(run.recipe, run.objective)
    measured = [row for row in evaluations if row.get(f"eval_{name}") is not None]
    best = max if greater else min
    return "eval", best(measured, key=lambda row: row[f"eval_{name}"], default=None)
