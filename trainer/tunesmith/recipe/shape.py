"""What the section models expect at a place of the recipe: found by walking their annotations, told in
words."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Union, cast, get_args, get_origin

from pydantic.fields import FieldInfo

from tunesmith.recipe.base import Section
from tunesmith.recipe.faults import Path
from tunesmith.recipe.moments import Moment
from tunesmith.recipe.selectors import WORDS, LayersText, SelectorText

_LAYERS = FieldInfo.from_annotation(cast(Any, LayersText))
_SELECTOR = FieldInfo.from_annotation(cast(Any, SelectorText))
_MOMENT = cast(Any, Moment)


def is_section(tp: object) -> bool:
    return isinstance(tp, type) and issubclass(tp, Section)


def members(info: FieldInfo) -> list[FieldInfo]:
    """The alternatives of a union, each as a field of its own (`null` too); a single one where there is no
    union."""
    if get_origin(info.annotation) in (Union, types.UnionType):
        return [FieldInfo.from_annotation(arg) for arg in get_args(info.annotation)]
    return [info]


def sections(info: FieldInfo) -> list[type[Section]]:
    """The sections that may stand there themselves, those of a tagged union among them."""
    found: list[Any] = []
    for member in members(info):
        if is_section(member.annotation):
            found.append(member.annotation)
        elif tags(member):
            found += sections(member)
    return found


def choices(info: FieldInfo) -> list[str]:
    """The words that a `Literal` or the tag of a tagged union allows."""
    return [
        word
        for member in members(info)
        if get_origin(member.annotation) is Literal
        for word in get_args(member.annotation)
    ]


def tags(info: FieldInfo) -> dict[str, type[Section]]:
    """The sections of a tagged union by tag; empty for anything else."""
    if not isinstance(name := info.discriminator, str):
        return {}
    return {tag: section for section in sections(info) for tag in choices(section.model_fields[name])}


def tagged(info: FieldInfo) -> FieldInfo:
    """The tagged union itself where `null` is its alternative; else `info`."""
    return next((member for member in members(info) if tags(member)), info)


def items_of(alternatives: list[FieldInfo]) -> set[object]:
    """The types of the items, where one of the alternatives is a list."""
    lists = [member for member in alternatives if get_origin(member.annotation) is list]
    return {
        kind.annotation
        for member in lists
        for kind in members(FieldInfo.from_annotation(get_args(member.annotation)[0]))
    }


def describe(info: FieldInfo) -> str:
    """What is accepted, in words: "a whole number above 0, epoch or null"."""
    if info.annotation is _MOMENT:
        return "a moment: 0.2 (of all steps), 100 (a step) or 1.5 epochs"
    if info.metadata == _LAYERS.metadata:
        return "layers: first 2, last 2, 3 or 2-5"
    if info.metadata == _SELECTOR.metadata:
        return f"parameters: {', '.join(WORDS)}, last 2 layers, layers 2-5 or a pattern on names"
    alternatives = members(info)
    if len(alternatives) > 1 and not tags(info):
        words = [describe(m) for m in sorted(alternatives, key=lambda m: m.annotation is types.NoneType)]
        words = list(dict.fromkeys(words))
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    annotation, args = info.annotation, get_args(info.annotation)
    origin = get_origin(annotation) or annotation
    if origin is Literal:
        return str(args[0]) if len(args) == 1 else "one of " + ", ".join(map(str, args))
    if origin is tuple:
        parts = [describe(FieldInfo.from_annotation(arg)) for arg in args]
        each = f"each {parts[0]}" if len(set(parts)) == 1 else ", then ".join(parts)
        return f"a list of {len(parts)}: {each}"
    if origin is list:
        least = " (at least one)" if any(getattr(m, "min_length", None) == 1 for m in info.metadata) else ""
        return f"a list of {_plural(FieldInfo.from_annotation(args[0]))}{least}"
    if origin is int or origin is float:
        return ("a whole number" if origin is int else "a number") + _bounds(info)
    if origin is str:
        return "a string" + _form(info)
    names: dict[object, str] = {types.NoneType: "null", bool: "true or false"}
    return names.get(origin, "a mapping")


def _form(info: FieldInfo) -> str:
    for item in info.metadata:
        if pattern := getattr(item, "pattern", None):
            return f" of the form {pattern.removeprefix('^').removesuffix('$')}"
        if getattr(item, "min_length", None) == 1:
            return " that is not empty"
    return ""


def _plural(item: FieldInfo) -> str:
    """What the items of a list are."""
    if item.metadata == _SELECTOR.metadata:
        return "parameters (backbone, last 2 layers, a pattern on names, …)"
    if tags(item) or is_section(item.annotation):
        return "mappings"
    kinds = members(item)
    if len(kinds) > 1:
        return " or ".join(map(_plural, kinds))
    names: dict[object, str] = {str: "strings", int: "whole numbers", float: "numbers"}
    return names[item.annotation] + _bounds(item)


def _bounds(info: FieldInfo) -> str:
    limits = {
        name: f"{getattr(item, name):g}"
        for item in info.metadata
        for name in ("gt", "ge", "lt", "le")
        if getattr(item, name, None) is not None
    }
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    if limits.keys() == {"ge", "le"}:
        return f" from {limits['ge']} to {limits['le']}"
    return f" {' and '.join(f'{words[name]} {limit}' for name, limit in limits.items())}" if limits else ""


@dataclass(frozen=True, slots=True)
class Spot:
    """A place of the recipe: the way to it as the user wrote it, what is expected there (None: no such
    setting) and what stands there; for a setting of a section, that section, and the tagged union that it
    is one of, with its tag."""

    path: Path
    info: FieldInfo | None
    value: Any
    section: type[Section]
    union: FieldInfo | None = None
    tag: str = ""


def locate(loc: Path, values: Any, root: type[Section]) -> Spot | None:
    """The place that pydantic's `loc` means, without the tags and type names which pydantic puts between the
    keys. None where the error is that of an alternative of a union which the value was not meant for."""
    spot = Spot((), FieldInfo.from_annotation(root), values, root)
    rest = list(loc)
    while rest and spot.info is not None:
        following = _step(spot, spot.info, rest)
        if following is None or following is spot:
            return following
        spot = following
    return spot


def _step(spot: Spot, info: FieldInfo, rest: list[str | int]) -> Spot | None:
    """One step on; takes what it uses off `rest`. The same spot: the error is about this place as a whole."""
    annotation, args = info.annotation, get_args(info.annotation)
    origin = get_origin(annotation) or annotation
    if is_section(annotation):
        key = rest.pop(0)
        section: Any = annotation
        value = spot.value.get(key) if isinstance(spot.value, Mapping) else None
        return Spot((*spot.path, key), section.model_fields.get(key), value, section, spot.union, spot.tag)
    if by_tag := tags(info):
        tag = str(rest.pop(0))
        return replace(spot, info=FieldInfo.from_annotation(by_tag[tag]), union=info, tag=tag)
    if origin in (Union, types.UnionType):
        real = [member for member in members(info) if member.annotation is not types.NoneType]
        if len(real) == 1:
            return replace(spot, info=real[0])
        return _alternative(spot, real, str(rest.pop(0)))
    if origin is dict and isinstance(spot.value, Mapping):
        key = rest.pop(0)
        inner = FieldInfo.from_annotation(args[0] if rest == ["[key]"] else args[1])
        value = key if rest == ["[key]"] else spot.value.get(key)
        return replace(spot, path=(*spot.path, key), info=inner, value=value, union=None)
    if origin in (list, tuple):
        index = rest.pop(0)
        assert isinstance(index, int)
        inner = FieldInfo.from_annotation(args[0] if origin is list else args[min(index, len(args) - 1)])
        if isinstance(spot.value, Mapping):  # one source, written without the list
            return replace(spot, info=inner, union=None)
        if index >= len(spot.value):
            return spot
        return replace(spot, path=(*spot.path, index), info=inner, value=spot.value[index], union=None)
    return spot


def _alternative(spot: Spot, real: list[FieldInfo], label: str) -> Spot | None:
    """pydantic reports every alternative of an untagged union: go on only in the one that the value looks
    like, else stay and say what all of them are. A validator stands around its alternative in `label`:
    `function-after[check(), Later]`."""
    if isinstance(spot.value, Mapping | list):
        kind = Section if isinstance(spot.value, Mapping) else list
        label = re.sub(r"^function-\w+\[\w+\(\), (.*)\]$", r"\1", label)
        for member in real:
            origin = get_origin(member.annotation) or member.annotation
            if isinstance(origin, type) and issubclass(origin, kind):
                meant = label == origin.__name__ or label.startswith(f"{origin.__name__}[")
                return replace(spot, info=member) if meant else None
    return spot


def settings(root: type[Section]) -> dict[str, list[tuple[FieldInfo, str | None]]]:
    """Every setting by its dotted name, list indices and the user's own names left out: what is expected there, once
    per section of a tagged union, with its (first) tag."""
    found: dict[str, list[tuple[FieldInfo, str | None]]] = {}

    def visit(section: type[Section], prefix: str, tag: str | None) -> None:
        for name, info in section.model_fields.items():
            found.setdefault(prefix + name, []).append((info, tag))
            for inner, inner_tag in inner_sections(info).items():
                visit(inner, f"{prefix}{name}.", inner_tag)

    visit(root, "", None)
    return found


def inner_sections(info: FieldInfo) -> dict[type[Section], str | None]:
    """The sections that may stand there, in a list or under names there, each with its (first) tag where it has one."""
    found: dict[type[Section], str | None] = {}
    for member in [info] if tags(info) else members(info):
        if get_origin(member.annotation) in (list, dict):
            found |= inner_sections(FieldInfo.from_annotation(get_args(member.annotation)[-1]))
        elif by_tag := tags(member):
            found |= {section: tag for tag, section in reversed(by_tag.items())}
        elif is_section(member.annotation):
            found[member.annotation] = None  # type: ignore[index]
    return found
