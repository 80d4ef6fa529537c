"""From what the user wrote to what was meant: for a key that no section has, and a value that no setting
takes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, cast, get_origin

from pydantic.fields import FieldInfo

from tunesmith.recipe import names, values
from tunesmith.recipe.faults import Path
from tunesmith.recipe.names import plain
from tunesmith.recipe.root import Recipe
from tunesmith.recipe.shape import Spot, inner_sections, settings, tags


@cache
def _settings() -> dict[str, list[tuple[FieldInfo, str | None]]]:
    return settings(Recipe)


def generic(path: Path) -> str:
    """The dotted name of a setting whatever the source it stands in: `data.eval.0.path` is
    `data.train.path`."""
    name = ".".join(str(part) for part in path if not isinstance(part, int))
    for part in ("data.eval.", "data.test."):
        if name.startswith(part):
            return "data.train." + name.removeprefix(part)
    return name


def close(name: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like `name`, if any is."""
    by_plain = {plain(candidate): candidate for candidate in known}
    found = difflib.get_close_matches(plain(name), list(by_plain), 1, cutoff)
    return by_plain[found[0]] if found else None


def listing(words: Sequence[str], last: str = "or") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def show(value: object) -> str:
    """A value as it looks in a recipe, in short."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f"'{value}'" if len(value) <= 60 else f"'{value[:57]}…'"
        case Mapping():
            return "a mapping"
        case list():
            return f"a list of {len(cast(list[Any], value))}" if value else "an empty list"
        case _:
            return str(value)


_STRATEGIES = (
    "averaging.",
    "data.augment.",
    "data.curriculum.",
    "data.max_length_schedule.",
    "data.sampling.",
    "distill.",
    "evaluation.tune_thresholds.",
    "multitask.",
    "objective.loss.",
    "regularization.",
    "remember.",
    "tasks.",
)


def _from_elsewhere(name: str) -> str | None:
    if name in names.KEYS:
        return f"here it is {names.KEYS[name]}"
    return names.NOTES.get(name)


def _whose(spot: Spot, leaf: str) -> str | None:
    """The other sections of the tagged union that have the key: `sgd has no betas; adamw and adam have
    it`."""
    if spot.union is None:
        return None
    owners = [tag for tag, section in tags(spot.union).items() if leaf in section.model_fields]
    if not owners:
        return None
    return f"{spot.tag} has no {leaf}; {listing(owners, 'and')} {'has' if len(owners) == 1 else 'have'} it"


def _places(leaf: str) -> list[str]:
    """Where a key of ours belongs; `data.train` stands for all three lists of sources, and a strategy that has a
    setting of the same name is not what is meant."""
    places = [
        key
        for key in _settings()
        if key.rpartition(".")[2] == leaf and not key.startswith(("data.eval.", "data.test."))
    ]
    return [key for key in places if not key.startswith(_STRATEGIES)] or places


def unknown_key(spot: Spot) -> str:
    """What to say of a key that its section does not have."""
    leaf, known = plain(spot.path[-1]), list(spot.section.model_fields)
    section = generic((*spot.path[:-1], leaf)).rpartition(".")[0]
    if advice := _from_elsewhere(f"{section}.{leaf}") or _whose(spot, leaf) or _from_elsewhere(leaf):
        return advice.replace("data.train.", f"data.{spot.path[1]}.") if section == "data.train" else advice
    places, guess = _places(leaf), close(leaf, known)
    meant_elsewhere = guess is None or not places[0].startswith(_STRATEGIES) if places else False
    if meant_elsewhere and len(places) <= 3 and leaf not in known:
        return f"does not belong here; it is {listing(places)}"
    if guess:
        return f"unknown key; did you mean {guess}?"
    foreign = [name for name in (*names.KEYS, *names.NOTES) if "." not in name]
    if guess := close(leaf, foreign, 0.85):
        return f"unknown key; if {guess} is meant: {_from_elsewhere(guess)}"
    everywhere = {key.rpartition(".")[2]: key for key in reversed(_settings())}
    if guess := close(leaf, everywhere, 0.8):
        return f"unknown key; did you mean {everywhere[guess]}?"
    here = ".".join(str(part) for part in spot.path[:-1] if not isinstance(part, int))
    return f"unknown key; {here or 'a recipe'} takes {', '.join(known)}"


def meant_word(path: Path, allowed: Sequence[str], value: object) -> str | None:
    """The allowed word that `value` was probably meant to be."""
    if value is None:
        return None
    if phrase := values.PHRASES.get(generic(path), {}).get(plain(value)):
        return phrase.tag
    meant = values.VALUES.get(generic(path), {}).get(plain(value))
    return meant if meant is not None and meant in allowed else close(value, allowed)


def wrong_choice(path: Path, allowed: Sequence[str], value: object) -> str:
    """What to say of a value that is not one of the words `allowed`."""
    key, word = generic(path), "" if value is None else plain(value)
    if key == "data.train.format" and word in values.FILE_KINDS:
        return (
            f"{show(value)} is how the file is written, which its name tells; format says what a row holds: "
            f"one of {', '.join(allowed)}"
        )
    if phrase := values.PHRASES.get(key, {}).get(word):
        return f"here {show(value)} is {phrase.text}"
    meant = values.VALUES.get(key, {}).get(word, word)
    if meant in allowed:
        return f"here {show(value)} is {meant}"
    if meant in values.ROADMAP.get(key, ()):
        return f"{meant} is not available in this version; it has {', '.join(allowed)}"
    guess = close(word, allowed)
    return f"must be one of {', '.join(allowed)}, not {show(value)}" + (
        f"; did you mean {guess}?" if guess else ""
    )


def hint(info: FieldInfo, path: Path, value: Any) -> str:
    """What a value of the wrong type was probably meant to be; empty where nothing is known."""
    if isinstance(value, str) and (phrase := values.PHRASES.get(generic(path), {}).get(plain(value))):
        return f"; write {phrase.text}"
    if inner := inner_sections(info):
        meant = _section_hint(path, value, list(next(iter(inner)).model_fields))
        in_list = get_origin(info.annotation) is list and meant.startswith("; write {")
        return re.sub(r"\{.*?\}", r"[\g<0>]", meant, count=1) if in_list else meant
    if isinstance(value, str) and {info.annotation} & {int, float} and _number(value) is not None:
        return "; remove the quotes"
    if isinstance(value, str) and info.annotation is bool and value.lower() in {"yes", "on", "no", "off"}:
        return f"; did you mean {'true' if value.lower() in {'yes', 'on'} else 'false'}?"
    if isinstance(value, float) and info.annotation is int and value.is_integer():
        return f"; did you mean {int(value)}?"
    if isinstance(value, int | float) and info.annotation is str:
        return "; put it in quotes"
    return ""


def _section_hint(path: Path, value: Any, keys: list[str]) -> str:
    if value is None:
        return f"; give its keys ({', '.join(keys[:4])}, …) or leave it out"
    key = generic(path)
    if isinstance(value, str) and key in values.SHORT:
        leaf = values.SHORT[key]
        if phrase := values.PHRASES.get(f"{key}.{leaf}", {}).get(plain(value)):
            return f"; write {phrase.text}"
        word = values.VALUES.get(f"{key}.{leaf}", {}).get(plain(value), value)
        rest = ", format: …" if leaf == "path" else ""
        return f"; write {{{leaf}: {word}{rest}}}"
    if meant := values.VALUES.get(key, {}).get(plain(value)):
        return f"; here {show(value)} is {meant}"
    return ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
