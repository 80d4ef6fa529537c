"""A recipe's paths made independent of the folder that it lies in: the resolved recipe in a run's folder, and the
ranks that read it, must mean the same files."""

from __future__ import annotations

import os
import re
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError
from tunesmith.recipe.augment import BackTranslation, Operation, Synonyms, TokenInsert
from tunesmith.recipe.curriculum import ByLoss
from tunesmith.recipe.data import Data, Source
from tunesmith.recipe.distill import Distill
from tunesmith.recipe.losses import Function
from tunesmith.recipe.objective import Objective
from tunesmith.recipe.remember import Remember
from tunesmith.recipe.root import Recipe
from tunesmith.recipe.tasks import Task
from tunesmith.recipe.tracking import Tracking

_VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)\}")


def resolve_paths(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with absolute paths: those of data and folders are relative to `base`, the recipe's folder;
    `output_dir` is relative to where the command is typed. `$NAME` and `${NAME}` are environment variables; one
    that is not set is a UserError. Hub ids and builtin sources stay as they are."""
    model = recipe.model.model_copy(
        update={
            name: _model_path(value, f"model.{name}", base)
            for name in ("model_name_or_path", "tokenizer", "chat_template")
            if isinstance(value := getattr(recipe.model, name), str)
        }
    )
    adapters = [
        adapter.model_copy(update={"path": _model_path(adapter.path, "trainable.adapters.path", base)})
        if adapter.path is not None
        else adapter
        for adapter in recipe.trainable.adapters
    ]
    return recipe.model_copy(
        update={
            "model": model,
            "trainable": recipe.trainable.model_copy(update={"adapters": adapters}),
            **_rows(recipe, base),
            "distill": _distill(recipe, base),
            "tasks": {
                name: task.model_copy(update=_rows(task, base) | _run(task, base))
                for name, task in recipe.tasks.items()
            },
            "remember": _remember(recipe.remember, base),
            "tracking": _tracking(recipe.tracking, base),
            "output_dir": _absolute(recipe.output_dir, "output_dir", Path.cwd()),
        }
    )


def _rows(holder: Recipe | Task, base: Path) -> dict[str, Any]:
    """`data` and `objective`, where there are any, of a recipe or of a task."""
    if holder.data is None:
        return {}
    found = {"data": _data(holder.data, base)}
    return found if holder.objective is None else found | {"objective": _objective(holder.objective, base)}


def _run(task: Task, base: Path) -> dict[str, Any]:
    return {} if task.run is None else {"run": _absolute(task.run, "tasks.run", base)}


def _remember(remember: Remember | None, base: Path) -> Remember | None:
    if remember is None:
        return None
    changes: dict[str, Any] = {
        "probes": {
            name: probe.model_copy(update={"run": _absolute(probe.run, f"remember.probes.{name}.run", base)})
            for name, probe in remember.probes.items()
        }
    }
    if remember.run is not None:
        changes["run"] = _absolute(remember.run, "remember.run", base)
    if remember.ewc is not None and remember.ewc.data is not None:
        sources = [_source(source, "ewc", base) for source in remember.ewc.data]
        changes["ewc"] = remember.ewc.model_copy(update={"data": sources})
    return remember.model_copy(update=changes)


def _data(data: Data, base: Path) -> Data:
    splits = {
        name: [_source(source, name, base) for source in getattr(data, name)]
        for name in ("train", "eval", "test")
    }
    curriculum = data.curriculum
    if isinstance(curriculum, ByLoss):
        reference = _absolute(curriculum.reference, "data.curriculum.reference", base)
        curriculum = curriculum.model_copy(update={"reference": reference})
    augment = [_operation(one, f"data.augment.{i}", base) for i, one in enumerate(data.augment)]
    cache = None if data.cache_dir is None else _absolute(data.cache_dir, "data.cache_dir", base)
    return data.model_copy(
        update={**splits, "cache_dir": cache, "curriculum": curriculum, "augment": augment}
    )


def _tracking(tracking: Tracking, base: Path) -> Tracking:
    if tracking.compare_with is None:
        return tracking
    compared = _absolute(tracking.compare_with, "tracking.compare_with", base)
    return tracking.model_copy(update={"compare_with": compared})


def _source(source: Source, split: str, base: Path) -> Source:
    if source.path.startswith(("hub:", "builtin:")):
        return source
    return source.model_copy(update={"path": _absolute(source.path, f"data.{split}.path", base)})


def _operation(operation: Operation, key: str, base: Path) -> Operation:
    match operation:
        case Synonyms(table=str(table)) | TokenInsert(table=str(table)):
            return operation.model_copy(update={"table": _absolute(table, f"{key}.table", base)})
        case BackTranslation():
            names = {
                name: _model_path(value, f"{key}.{name}", base)
                for name in ("model", "back_model")
                if isinstance(value := getattr(operation, name), str)
            }
            return operation.model_copy(update=names)
        case _:
            return operation


def _objective(objective: Objective, base: Path) -> Objective:
    """A loss of the user's own: its file's place, and what is in it, so that a run goes on with the same."""
    loss = objective.loss
    if not isinstance(loss, Function):
        return objective
    where, _, name = loss.function.rpartition(":")
    key = "objective.loss.function"
    function = f"{_absolute(where, key, base)}:{name}" if where.endswith(".py") else loss.function
    try:
        digest = sha256(function_file(function).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{key}: {where} cannot be read: {error.strerror}") from None
    known = loss.model_copy(update={"function": function, "sha256": loss.sha256 or digest})
    return objective.model_copy(update={"loss": known})


def function_file(function: str) -> Path:
    """The file of `path.py:name` or `module:name`. UserError where there is no such module."""
    where = function.rpartition(":")[0]
    if where.endswith(".py"):
        return Path(where)
    try:
        spec = find_spec(where)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise UserError(f"objective.loss.function: there is no module {where}; or name a file: path.py:name")
    return Path(spec.origin)


def _distill(recipe: Recipe, base: Path) -> Distill | None:
    distill = recipe.distill
    if distill is None:
        return None
    key, changes = "distill.teacher_model_name_or_path", dict[str, Any]()
    if distill.teacher_model_name_or_path is not None:
        changes["teacher_model_name_or_path"] = _model_path(distill.teacher_model_name_or_path, key, base)
    changes["teachers"] = [
        one.model_copy(
            update={"model_name_or_path": _model_path(one.model_name_or_path, "distill.teachers", base)}
        )
        for one in distill.teachers
    ]
    if distill.offline is not None and distill.offline.path is not None:
        path = _absolute(distill.offline.path, "distill.offline.path", base)
        changes["offline"] = distill.offline.model_copy(update={"path": path})
    return distill.model_copy(update=changes)


def _absolute(path: str, key: str, base: Path) -> str:
    return os.path.abspath(base / Path(_expand(path, key)).expanduser())


def _model_path(name: str, key: str, base: Path) -> str:
    """A folder or file that is there becomes absolute; anything else is a hub id or a name of ours."""
    expanded = _expand(name, key)
    local = base / Path(expanded).expanduser()
    return os.path.abspath(local) if local.exists() or expanded.startswith((".", "/", "~")) else expanded


def _expand(text: str, key: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(f"{key}: the environment variable {name} is not set")
        return os.environ[name]

    return _VARIABLE.sub(value, text)
