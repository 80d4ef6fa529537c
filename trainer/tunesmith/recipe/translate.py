"""pydantic's errors in plain words: for each one, the place as the user wrote it and what is wrong there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tunesmith.recipe.advice import generic, hint, meant_word, show, unknown_key, wrong_choice
from tunesmith.recipe.faults import Path, Problem
from tunesmith.recipe.root import Recipe
from tunesmith.recipe.shape import Spot, choices, describe, items_of, locate, members, tagged, tags
from tunesmith.recipe.values import WORD_FOR_SECTION


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
    name, loc = _tag_name(spot.info), error["loc"]
    meant = meant_word((*spot.path, name), list(tags(tagged(spot.info))), spot.value[name])
    if meant is None:
        return []
    corrected = _with(values, spot.path, {**spot.value, name: meant})
    try:
        Recipe.model_validate(corrected)
    except ValidationError as inner:
        return translate([e for e in inner.errors() if e["loc"][: len(loc)] == loc], corrected)
    return []


def _with(holder: Any, path: Path, value: Any) -> Any:
    """A copy of `holder` with `value` at `path`."""
    if not path:
        return value
    copy = holder.copy()
    copy[path[0]] = _with(holder[path[0]], path[1:], value)
    return copy


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
            known = ", ".join(tags(tagged(info)))
            return Problem((*path, _tag_name(info)), f"is missing; it is one of {known}")
        case "union_tag_invalid":
            name = _tag_name(info)
            allowed = list(tags(tagged(info)))
            return Problem((*path, name), wrong_choice((*path, name), allowed, spot.value[name]))
        case _:
            return Problem(path, _must_be(path, info, spot.value))


def _tag_name(info: FieldInfo) -> str:
    return cast(str, tagged(info).discriminator)


def _from_validator(path: Path, message: str) -> Problem:
    """Our validators' messages; one that begins with `key: ` is about that key of the section."""
    if found := re.match(r"([a-z_]+(?:\.[a-z_]+)*): ", message):
        return Problem((*path, *found[1].split(".")), message[found.end() :])
    return Problem(path, message)


def _must_be(path: Path, info: FieldInfo, value: Any) -> str:
    real = [member for member in members(info) if member.annotation is not type(None)]
    words = choices(info)
    if generic(path) in WORD_FOR_SECTION and isinstance(value, str | int):
        return wrong_choice((*path, _tag_name(info)), list(tags(tagged(info))), value)
    if words and len(real) == 1:
        return wrong_choice(path, words, value)
    meant = next((text for member in real if (text := hint(member, path, value))), "")
    if not meant and type(value) in items_of(real):
        meant = f"; write [{value}]"
    return f"must be {describe(info)}, not {show(value)}{meant}"
