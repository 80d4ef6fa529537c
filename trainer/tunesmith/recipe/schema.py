"""The JSON Schema of a recipe, for editors."""

from __future__ import annotations

import inspect
import re
from typing import Any

from tunesmith.recipe.base import Section
from tunesmith.recipe.model import Model
from tunesmith.recipe.root import Recipe
from tunesmith.recipe.shape import inner_sections, tagged, tags


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file. A section is described by its docstring, a setting by the
    sentences of it that name the setting."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["required"] = [name for name in schema["required"] if name != "run_name"]  # the file's name
    definitions = {section.__name__: section for section in _sections(Recipe)}
    for name, definition in [("Recipe", schema), *schema["$defs"].items()]:
        text = _text(definitions[name])
        definition["description"] = text
        for key, prop in definition.get("properties", {}).items():
            if about := _about(key, text):
                prop["description"] = about
    _add_short_forms(schema["$defs"])
    return schema


def _add_short_forms(definitions: dict[str, Any]) -> None:
    """What validators that run before the models take too: one adapter without the list, one word for a whole
    quantisation."""
    adapters: dict[str, Any] = definitions["Trainable"]["properties"]["adapters"]
    adapters["anyOf"] = [
        {"type": adapters.pop("type"), "items": (item := adapters.pop("items"))},
        item,
    ]
    quantization: dict[str, Any] = definitions["Model"]["properties"]["quantization"]
    quantization["anyOf"].append({"enum": list(tags(tagged(Model.model_fields["quantization"])))})
    for section in tags(Recipe.model_fields["objective"]).values():
        loss = definitions[section.__name__]["properties"]["loss"]
        loss["anyOf"].append({"enum": list(tags(tagged(section.model_fields["loss"])))})


def _sections(section: type[Section]) -> list[type[Section]]:
    found = [section]
    for info in section.model_fields.values():
        for inner in inner_sections(info):
            found += _sections(inner)
    return found


def _text(section: type[Section]) -> str:
    """The docstrings of the section and of the sections that it extends."""
    classes = [cls for cls in section.__mro__ if issubclass(cls, Section) and cls is not Section]
    return " ".join(" ".join(inspect.cleandoc(cls.__doc__).split()) for cls in classes if cls.__doc__)


def _about(key: str, text: str) -> str:
    sentences = re.split(r"(?<=[.;]) (?=[A-Z`])", text)
    return " ".join(s for s in sentences if re.search(rf"`{key}\b", s)).rstrip(";")
