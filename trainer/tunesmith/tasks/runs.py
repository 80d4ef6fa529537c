"""Tasks that come from finished runs: their data, objective and labels into the recipe, their heads into the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError
from tunesmith.recipe import Recipe
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.model import Model
from tunesmith.recipe.tasks import Task
from tunesmith.tasks.replay import replayed

_LEARNT = ("labels", "problem")  # what an objective learnt from its training rows that the recipe can say


def read_runs(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with what the finished runs of its tasks say written out, `remember.replay` as tasks. Raises UserError
    for a folder that is no such run."""
    remembers = recipe.remember is not None and recipe.remember.replay is not None
    recipe = replayed(recipe)
    tasks = {
        name: task
        if task.run is None
        else _read("remember.run" if remembers else f"tasks.{name}.run", name, task, base / task.run)
        for name, task in recipe.tasks.items()
    }
    return recipe.model_copy(update={"tasks": tasks})


def _read(key: str, name: str, task: Task, folder: Path) -> Task:
    if not (folder / "recipe.yaml").is_file() or not (folder / "final").is_dir():
        raise UserError(f"{key}: {folder} is not the folder of a finished run")
    old = load_recipe(folder / "recipe.yaml").recipe
    if old.tasks:
        raise UserError(f"{key}: {folder} is a run of several tasks: name a run of one")
    if old.trainable.adapters:
        raise UserError(f"{key}: {folder} trained adapters, which have its head: name a run without")
    learnt = _learnt(folder)
    known = {field: learnt[field] for field in _LEARNT if learnt.get(field)}
    fields = {field: value for field, value in known.items() if field in type(old.objective).model_fields}
    if learnt.get("problem") == "regression":
        fields.pop("labels", None)
    objective = old.objective.model_copy(update=fields)
    if task.objective is not None and task.objective != objective:
        raise UserError(f"tasks.{name}.objective: is not that of {folder}: leave it out")
    return task.model_copy(update={"data": task.data or old.data, "objective": objective})


def _learnt(folder: Path) -> dict[str, Any]:
    path = folder / "objective.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: holds the labels and cannot be read: {error}") from None


def weights_of(settings: Model, folder: Path) -> Model:
    """The model section that loads the run's own weights."""
    path = str((folder / "final").resolve())
    return settings.model_copy(
        update={"model_name_or_path": path, "init": "pretrained", "config": {}, "revision": None}
    )
