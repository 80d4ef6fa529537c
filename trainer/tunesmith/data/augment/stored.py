"""An example as one line of JSON, kept beside its encoded rows, and back."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from tunesmith.data.examples import (
    Answer,
    Chat,
    Example,
    Labelled,
    Message,
    Question,
    SourceTarget,
    Tokens,
)
from tunesmith.errors import Place

EXAMPLE, PART = "example", "example_part"
"""The columns of a table that keep the example of a row, and which of its rows it is."""

_KINDS: dict[str, type[Labelled | Tokens | Question | SourceTarget | Chat]] = {
    kind.__name__: kind for kind in (Labelled, Tokens, Question, SourceTarget, Chat)
}
_NOWHERE = Place("", 0)


def to_json(example: Example) -> str:
    """Without its place, which the table has."""
    values = asdict(example)
    values.pop("place")
    return json.dumps({"type": type(example).__name__} | values, ensure_ascii=False)


def from_json(text: str) -> Example:
    values: dict[str, Any] = json.loads(text)
    kind = _KINDS[values.pop("type")]
    values = {name: _tuples(value) for name, value in values.items()}
    if kind is Question:
        values["answers"] = tuple(Answer(**answer) for answer in values["answers"])
    if kind is Chat:
        turns = [{name: _tuples(value) for name, value in turn.items()} for turn in values["messages"]]
        values["messages"] = tuple(Message(**turn) for turn in turns)
    return kind(**values, place=_NOWHERE)


def _tuples(value: Any) -> Any:
    """An example's own sequences are tuples; mappings within it are the data's."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
