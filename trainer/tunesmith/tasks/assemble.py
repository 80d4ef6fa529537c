"""The models of all tasks, built as those of single runs and joined on one backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tunesmith.model import Loaded, load_model
from tunesmith.module import AUTOCAST
from tunesmith.precision import choose
from tunesmith.recipe import Recipe
from tunesmith.tasks.models import TaskModels
from tunesmith.tasks.objective import Task, TaskObjective
from tunesmith.tasks.runs import weights_of


def assemble_tasks(
    recipe: Recipe, base: Path, objective: TaskObjective, tokenizer: Any, device: torch.device
) -> Loaded:
    """TaskModels, whole on the CPU; every task's new weights are those that a run of it alone begins with. What only
    tasks have that are not trained is frozen."""
    models: dict[str, Any] = {}
    shared: dict[str, Any] = {}  # by Auto class: models whose own output is trained
    facts: dict[str, Any] = {}
    notes: list[str] = []
    # the backbone is the first one's: of a trained task, without weights of its own from a finished run
    first = sorted(
        objective.parts, key=lambda n: (recipe.tasks[n].run is not None, not objective.parts[n].trained)
    )
    for name in first:
        task = objective.parts[name]
        kind = _own_output(recipe, task)
        if kind is not None and kind in shared:
            models[name] = shared[kind]
            continue
        loaded = _load(recipe, base, name, task, tokenizer, device)
        if not task.trained:
            loaded.model.requires_grad_(False)
        models[name] = loaded.model
        if kind is not None:
            shared[kind] = loaded.model
        facts[name] = loaded.facts
        notes += [f"{name}: {note}" for note in loaded.notes]
    joined = TaskModels(models)
    about = {key: facts[first[0]].get(key) for key in ("weights", "attn_implementation")}
    about |= {"model_class": f"{type(joined.backbone).__name__} with {len(facts)} heads"}
    about |= {"parameters": sum(p.numel() for p in joined.parameters()), "tasks_models": facts}
    about["new_weights"] = _new_weights(joined, facts)
    return Loaded(joined, about, notes)


def _new_weights(joined: TaskModels, facts: Mapping[str, Any]) -> list[str]:
    """What no files gave, by its name in `joined`."""
    new = {
        name for task, about in facts.items() for name in joined.names_of(task, about.get("new_weights", []))
    }
    return sorted(new & {name for name, _ in joined.named_parameters()})


def _own_output(recipe: Recipe, task: Task) -> str | None:
    """The Auto class, where the task has no head of its own."""
    settings, name = recipe.tasks[task.name], task.objective.auto_class.__name__
    own_head = (
        settings.head is not None or settings.run is not None or bool(task.objective.config_overrides())
    )
    return None if own_head or name == "AutoModelForQuestionAnswering" else name


def _load(recipe: Recipe, base: Path, name: str, task: Task, tokenizer: Any, device: torch.device) -> Loaded:
    precision, _ = choose(recipe.training.precision, device)
    settings, head, run = recipe.model, recipe.tasks[name].head, recipe.tasks[name].run
    if run is not None:
        settings, head = weights_of(settings, base / run), None
    return load_model(
        settings,
        base,
        task.objective,
        tokenizer,
        recipe.training.seed,
        head=head,
        compute_dtype=AUTOCAST.get(precision, torch.float32),
    )
