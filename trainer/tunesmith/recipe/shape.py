"""What the section models expect at a place of the recipe: found by walking their annotations, told in
words."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from tunesmith.recipe.base import Section
from tunesmith.recipe.faults import Path


def is_section(tp: object) -> bool:
    return isinstance(tp, type) and issubclass(tp, Section)


def members(info: FieldInfo) -> list[FieldInfo]:
    """The alternatives of a union, each as a field of its own (`null` too); a single one where there is no
    union."""
    if get_origin(info.annotation) in (Union, types.UnionType):
        return [FieldInfo.from_annotation(arg) for arg in get_args(info.annotation)]
    return [info]


def sections(info: FieldInfo) -> list[type[Section]]:
    return [member.annotation for member in members(info) if is_section(member.annotation)]  # type: ignore[misc]


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
    if not isinstance(info.discriminator, str):
        return {}
    return {choices(section.model_fields[info.discriminator])[0]: section for section in sections(info)}


def takes_only_nothing(info: FieldInfo) -> bool:
    """A setting with a place but no effect yet: only `null` or the empty list is accepted."""
    return info.annotation is types.NoneType or any(
        getattr(m, "max_length", None) == 0 for m in info.metadata
    )


def describe(info: FieldInfo) -> str:
    """What is accepted, in words: "a whole number above 0, epoch or null"."""
    alternatives = members(info)
    if len(alternatives) > 1:
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
        least = ", at least one" if any(getattr(m, "min_length", None) == 1 for m in info.metadata) else ""
        return ("a list of strings" if args[0] is str else "a list of mappings") + least
    if origin is int or origin is float:
        return ("a whole number" if origin is int else "a number") + _bounds(info)
    names: dict[object, str] = {types.NoneType: "null", bool: "true or false", str: "a string"}
    return names.get(origin, "a mapping")


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
    is one of."""

    path: Path
    info: FieldInfo | None
    value: Any
    section: type[Section]
    union: FieldInfo | None = None


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
        return Spot((*spot.path, key), section.model_fields.get(key), value, section, spot.union)
    if by_tag := tags(info):
        tag = str(rest.pop(0))
        return replace(spot, info=FieldInfo.from_annotation(by_tag[tag]), union=info)
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
    like, else stay and say what all of them are."""
    if isinstance(spot.value, Mapping | list):
        kind = Section if isinstance(spot.value, Mapping) else list
        for member in real:
            origin = get_origin(member.annotation) or member.annotation
            if isinstance(origin, type) and issubclass(origin, kind):
                meant = label == origin.__name__ or label.startswith(f"{origin.__name__}[")
                return replace(spot, info=member) if meant else None
    return spot


def settings(root: type[Section]) -> dict[str, list[tuple[FieldInfo, str | None]]]:
    """Every setting by its dotted name, list indices left out: what is expected there, once per section of a
    tagged union, with its tag."""
    found: dict[str, list[tuple[FieldInfo, str | None]]] = {}

    def visit(section: type[Section], prefix: str, tag: str | None) -> None:
        for name, info in section.model_fields.items():
            found.setdefault(prefix + name, []).append((info, tag))
            names = {inner: tag for tag, inner in tags(info).items()}
            for inner in inner_sections(info):
                visit(inner, f"{prefix}{name}.", names.get(inner))

    visit(root, "", None)
    return found


def inner_sections(info: FieldInfo) -> list[type[Section]]:
    if get_origin(info.annotation) is list:
        return sections(FieldInfo.from_annotation(get_args(info.annotation)[0]))
    return sections(info)
