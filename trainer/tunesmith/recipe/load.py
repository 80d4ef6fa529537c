"""Reading, writing and describing recipes: a YAML file → `Recipe`, `Recipe` → YAML, `Recipe` → JSON
Schema."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

import tunesmith
from tunesmith.recipe import rules
from tunesmith.recipe.advice import close
from tunesmith.recipe.document import Document, read
from tunesmith.recipe.faults import Fault, Problem, RecipeError, problem_at
from tunesmith.recipe.overrides import Override, apply, as_written, origin, parse
from tunesmith.recipe.root import Recipe, with_default_tags
from tunesmith.recipe.rules_tasks import OWN
from tunesmith.recipe.schema import json_schema
from tunesmith.recipe.translate import translate

__all__ = ["Loaded", "RecipeError", "dump_recipe", "json_schema", "load_recipe", "shipped_recipes"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A sound recipe. `base` is the absolute folder of its file, against which its data paths are resolved;
    `source` is the file as the user typed it."""

    recipe: Recipe
    base: Path
    source: str
    document: Document
    overrides: tuple[Override, ...] = ()

    def place(self, key: str) -> str:
        """Where the setting `key` (dotted) comes from: `RECIPE:line`, or the override that gave it. For a
        default: the line of the section that it would stand in."""
        fault = _place(problem_at(key, ""), self.document, self.overrides)
        return f"override '{fault.override}'" if fault.override is not None else f"{self.source}:{fault.line}"


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe and lay `overrides` (`section.key=value`) over it. `run_name` is the file's stem
    where it is not given. Raises RecipeError with every fault at once. Whether data files exist is not
    looked at."""
    source, text = str(path), _text(path)
    document = read(text)
    values, faults = document.values, list(document.faults)
    if document.root is None and faults:
        raise RecipeError(source, faults)
    if values is None and not faults:
        raise RecipeError(source, [Fault(None, "", "is empty: a recipe needs model, data and objective")])
    if not isinstance(values, dict):
        message = "a recipe is a mapping of sections (model, data, objective, …)"
        raise RecipeError(source, faults or [Fault(1, "", message)])
    given, more = parse(overrides)
    done, still_more = apply(given, values)
    faults += [*more, *still_more]
    named = {"run_name": _run_name(path), **values}
    try:
        recipe = Recipe.model_validate(named)
    except ValidationError as error:
        problems = translate(error.errors(), named)
        problems += _broken_rules(named, {problem.path[0] for problem in problems})
        seen = {fault.key for fault in document.faults}
        faults += [_place(p, document, done) for p in _written(problems, values) if p.key not in seen]
    else:
        if not faults:
            return Loaded(recipe, path.absolute().parent, source, document, tuple(done))
    raise RecipeError(source, faults)


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except IsADirectoryError:
        found = sorted(file.name for file in path.iterdir() if file.suffix in {".yaml", ".yml"})
        held = f"; it holds {', '.join(found[:5])}{', …' if len(found) > 5 else ''}" if found else ""
        raise RecipeError(str(path), [Fault(None, "", f"is a folder, not a recipe file{held}")]) from None
    except FileNotFoundError:
        raise RecipeError(str(path), [Fault(None, "", f"no such file{_near(path)}")]) from None
    except OSError as error:
        raise RecipeError(str(path), [Fault(None, "", f"cannot be read: {error.strerror}")]) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8 (byte 0x{content[error.start]:02x}): save the file as UTF-8"
        raise RecipeError(str(path), [Fault(line, "", message)]) from None


def _near(path: Path) -> str:
    beside = {file.name: file for file in path.parent.iterdir()} if path.parent.is_dir() else {}
    shipped = {file.name: file for file in shipped_recipes().values()}
    for files in (beside, shipped):
        names = [name for name in files if name.endswith((".yaml", ".yml"))]
        name = close(path.name, names) or close(path.stem, names)
        if name is not None:
            return f"; did you mean {files[name]}?"
    return ""


def shipped_recipes() -> dict[str, Path]:
    """The complete recipes that come with tunesmith, by their path below `configs/` without the suffix."""
    package = Path(tunesmith.__file__).parent
    for folder in (package / "configs", package.parents[1] / "configs"):
        if folder.is_dir():
            return {
                file.relative_to(folder).with_suffix("").as_posix(): file
                for file in sorted(folder.rglob("*.yaml"))
            }
    return {}


def _run_name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+|\.{2,}", "-", path.stem).lstrip("._-")[:128] or "run"


def _broken_rules(values: dict[str, Any], faulty: set[str | int]) -> list[Problem]:
    """The rules that the sound sections break among themselves."""
    return rules.check(*_sound_sections(values, faulty))


def _sound_sections(values: dict[str, Any], faulty: set[str | int]) -> tuple[Recipe, set[str]]:
    hints, values = get_type_hints(Recipe, include_extras=True), with_default_tags(values)
    sound: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        if name not in faulty:
            sound[name] = (
                TypeAdapter[Any](hints[name]).validate_python(values[name])
                if name in values
                else field.get_default(call_default_factory=True)
            )
    return Recipe.model_construct(**sound), set(sound)


def _written(problems: list[Problem], values: dict[str, Any]) -> list[Problem]:
    return [Problem(as_written(problem.path, values), problem.message) for problem in problems]


def _place(problem: Problem, document: Document, overrides: Sequence[Override]) -> Fault:
    """The problem with its line: that of the key, or of the section that lacks it; or with its override."""
    line, depth = document.find(problem.path)
    override = origin(overrides, problem.path)
    if override is None and (depth == 0 or depth == len(problem.path)):
        # an override began the section that the file lacks, or made a section contradict itself
        about = problem.path[: max(depth, 1)]
        override = next((o for o in overrides if len(o.path) > depth and o.path[: len(about)] == about), None)
    text = None if override is None else override.text
    return Fault(line if text is None else None, problem.key, problem.message, text)


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
        case _:
            return value


class _Representer(SafeRepresenter):
    """Control and separator characters are written as escapes: unquoted or in single quotes YAML folds them."""

    def represent_text(self, text: str) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Representer.add_representer(str, _Representer.represent_text)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe, complete, as YAML that loads back to an equal one. Defaults without effect (such as the
    time of evaluations that there are no rows for) are left out: written down, they would be faults."""
    assert not rules.check(recipe, Recipe.model_fields), (
        "a recipe that breaks a rule was built around the models"
    )
    values: dict[str, Any] = _plain(recipe.model_dump())
    values = {name: value for name, value in values.items() if name not in OWN or value is not None}
    for problem in _broken_rules(values, set()):
        holder: Any = values
        for step in problem.path[:-1]:
            holder = holder[step]
        del holder[problem.path[-1]]
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 2**16
    stream = io.StringIO()
    yaml.dump(values, stream)
    return stream.getvalue()
