"""pydantic's errors in plain words: for each one, the place as the user wrote it and what is wrong there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tunesmith.recipe.advice import hint, meant_word, show, unknown_key, wrong_choice
from tunesmith.recipe.faults import Path, Problem
from tunesmith.recipe.root import Recipe
from tunesmith.recipe.shape import Spot, choices, describe, locate, members, tags, takes_only_nothing


def translate(errors: Sequence[ErrorDetails], values: Mapping[str, Any]) -> list[Problem]:
    """One problem per place, in pydantic's order. The error of the recipe as a whole is left out: it repeats
    `rules.check`."""
    problems: dict[Path, Problem] = {}
    for error in errors:
        if error["loc"] and (spot := locate(error["loc"], values, Recipe)) is not None:
            for problem in (_problem(error, spot), *_behind_tag(error, spot, values)):
                problems.setdefault(problem.path, problem)
    return list(problems.values())


def _behind_tag(error: ErrorDetails, spot: Spot, values: Mapping[str, Any]) -> list[Problem]:
    """pydantic looks no further where a tag is wrong: what else is wrong in the section that was meant."""
    if error["type"] != "union_tag_invalid" or spot.info is None:
        return []
    assert len(spot.path) == 1, "tagged unions are top-level sections"
    name = _tag_name(spot.info)
    meant = meant_word((*spot.path, name), list(tags(spot.info)), spot.value[name])
    if meant is None:
        return []
    section = str(spot.path[0])
    corrected = {**values, section: {**spot.value, name: meant}}
    try:
        Recipe.model_validate(corrected)
    except ValidationError as inner:
        return translate([e for e in inner.errors() if e["loc"][:1] == (section,)], corrected)
    return []


def _problem(error: ErrorDetails, spot: Spot) -> Problem:
    path, info = spot.path, spot.info
    if info is None:
        return Problem(path, unknown_key(spot))
    match error["type"]:
        case "value_error":
            return _from_validator(path, str(error.get("ctx", {})["error"]))
        case "missing" if error["loc"][-1] == path[-1]:
            words = choices(info)
            return Problem(path, f"is missing; it is one of {', '.join(words)}" if words else "is missing")
        case "union_tag_not_found":
            return Problem((*path, _tag_name(info)), f"is missing; it is one of {', '.join(tags(info))}")
        case "union_tag_invalid":
            name = _tag_name(info)
            return Problem((*path, name), wrong_choice((*path, name), list(tags(info)), spot.value[name]))
        case _:
            return Problem(path, _must_be(path, info, spot.value))


def _tag_name(info: FieldInfo) -> str:
    return cast(str, info.discriminator)


def _from_validator(path: Path, message: str) -> Problem:
    """Our validators' messages; one that begins with `key: ` is about that key of the section."""
    if found := re.match(r"([a-z_]+(?:\.[a-z_]+)*): ", message):
        return Problem((*path, *found[1].split(".")), message[found.end() :])
    return Problem(path, message)


def _must_be(path: Path, info: FieldInfo, value: Any) -> str:
    if takes_only_nothing(info):
        return "is not available in this version: leave it out"
    real = [member for member in members(info) if member.annotation is not type(None)]
    words = choices(info)
    if words and len(real) == 1:
        return wrong_choice(path, words, value)
    meant = next((text for member in real if (text := hint(member, path, value))), "")
    if not meant and isinstance(value, str) and get_origin(real[0].annotation) is list:
        meant = f"; write [{value}]"
    return f"must be {describe(info)}, not {show(value)}{meant}"
