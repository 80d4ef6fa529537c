"""The values of one row under a format's own column names, with errors that name the file's place and
column."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.data.opening import did_you_mean, inner_name
from tunesmith.data.rows import Row
from tunesmith.errors import DataError


def found(value: Any) -> str:
    """What a value is, in a few words for an error: `text 'abc'`, `a number (3)`, `null`, `a list`."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"a number ({value})"
        case str():
            return f"text {_short(value)!r}"
        case list() | tuple():
            return "a list"
        case dict():
            return "an object"
        case _:
            return f"a value of type {type(value).__name__}"


def _within(what: str) -> str:
    return f"{what}: " if what else ""


def _short(text: str) -> str:
    return text if len(text) <= 30 else text[:29] + "…"


@dataclass(frozen=True, slots=True)
class Cells:
    """A row, and the file's names for the format's columns (the same name where `columns` has none)."""

    row: Row
    columns: Mapping[str, str | list[str]]

    def name(self, key: str) -> str:
        name = self.columns.get(key, key)
        assert isinstance(name, str), "a list of columns is checked for and read by `formats`"
        return name

    def error(self, key: str, what: str) -> DataError:
        """A DataError about the column."""
        return DataError(what, self.row.place, self.name(key))

    def get(self, key: str) -> Any:
        """The value, null included. DataError where the row has no such column."""
        name = self.name(key)
        if name not in self.row.values:
            raise self.missing(name)
        return self.row.values[name]

    def find(self, key: str) -> Any:
        """The value, None where the row has no such column."""
        return self.row.values.get(self.name(key))

    def text(self, key: str) -> str:
        return self.text_of(key, self.get(key))

    def find_text(self, key: str) -> str:
        """The text, "" where there is none."""
        value = self.find(key)
        return "" if value is None else self.text_of(key, value)

    def text_of(self, key: str, value: Any, what: str = "") -> str:
        """`value`, which lies somewhere in the column, as text. `what` says where in it."""
        if not isinstance(value, str):
            raise self.error(key, f"{_within(what)}must be text, not {found(value)}")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = f"half a character (\\u{ord(value[error.start]):04x})"
                raise self.error(key, f"{_within(what)}{half}: repair the text") from error
        return value

    def list_of(self, key: str, value: Any, what: str = "") -> list[Any]:
        if not isinstance(value, list | tuple):
            raise self.error(key, f"{_within(what)}must be a list, not {found(value)}")
        return list(value)

    def objects(self, key: str, value: Any, what: str = "") -> list[dict[str, Any]]:
        """A list of objects, given as such or as JSON text; empty for null and ""."""
        if value is None or value == "":
            return []
        if isinstance(value, str):
            value = self.parsed(key, value, what)
        for one in self.list_of(key, value, what):
            if not isinstance(one, dict):
                raise self.error(key, f"{_within(what)}must be a list of objects; one is {found(one)}")
        return list(value)

    def parsed(self, key: str, text: str, what: str = "") -> Any:
        """The value of JSON text."""
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            bad = f"bad JSON at character {error.pos + 1}: {error.msg}"
            raise self.error(key, f"{_within(what)}{bad}") from error

    def number_of(self, key: str, value: Any) -> float:
        """A finite number. DataError for anything else."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, not {found(value)}")
        if not math.isfinite(value):
            raise self.error(key, f"must be a finite number, not {value}")
        return float(value)

    def missing(self, name: str) -> DataError:
        there = list(self.row.values)
        some = (
            "none"
            if not there
            else ", ".join(_short(column) for column in there[:12]) + ", …" * (len(there) > 12)
        )
        hint = did_you_mean(name, there)
        is_csv = inner_name(self.row.place.file).endswith((".csv", ".tsv"))
        if not hint and is_csv and there[0] != "0":
            hint = "; set `header: false` if the first line is a row"
        return DataError(f"there is no such column, but {some}{hint}", self.row.place, name)
