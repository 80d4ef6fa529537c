"""Which parameters a setting means: in words, by layers, or by a pattern on their names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator

Word = Literal["all", "backbone", "head", "embeddings", "norms", "biases"]
WORDS: tuple[str, ...] = get_args(Word)

_ENDS = re.compile(r"(first|last) (\d+)(?: layers?)?")
_RANGE = re.compile(r"(?:layers? )?(\d+)(?:-(\d+))?")


@dataclass(frozen=True, slots=True)
class Layers:
    """`first`: the layers from `start` (0 is the lowest) up to, not with, `stop`; counted from the top where
    `from_top`: 0 to 2 are then the highest two."""

    start: int
    stop: int
    from_top: bool = False


@dataclass(frozen=True, slots=True)
class Pattern:
    """A shell pattern on whole parameter names."""

    text: str


Selector = Word | Layers | Pattern


def parse_layers(text: str) -> Layers | None:
    """`first 2`, `last 2`, `3`, `2-5` (both counted in; 0 is the lowest), with or without the word layers."""
    if found := _ENDS.fullmatch(text):
        return Layers(0, int(found[2]), found[1] == "last")
    if found := _RANGE.fullmatch(text):
        start = int(found[1])
        return Layers(start, int(found[2] or start) + 1)
    return None


def parse(text: str) -> Selector:
    """A word, layers (with the word: `last 2 layers`, `layers 2-5`), or a shell pattern on parameter names."""
    if text in WORDS:
        return text  # pyright: ignore[reportReturnType]
    layers = parse_layers(text) if "layer" in text else None
    return layers or Pattern(text)


def _is_layers(text: str) -> str:
    layers = parse_layers(text)
    if layers is None or layers.start >= layers.stop:
        raise ValueError(f"{text!r} are no layers: write first 2, last 2, 3 or 2-5 (0 is the lowest)")
    return text


def _is_selector(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty: name parameters")
    if isinstance(layers := parse(text), Layers) and layers.start >= layers.stop:
        raise ValueError(f"{text!r} are no layers: write first 2 layers, last 2 layers or layers 2-5")
    return text


LayersText = Annotated[str, AfterValidator(_is_layers)]
SelectorText = Annotated[str, AfterValidator(_is_selector)]
