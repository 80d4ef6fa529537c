"""Encoded rows on disk, memory-mapped: every rank of a machine reads the same pages.

A folder per table: `table.json` (columns, their kinds, and the caller's meta) and, for each column, the values of
all rows behind one another (`NAME.values`) with the offsets of the rows (`NAME.offsets`, int64)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

Encoded = dict[str, Any]
"""A row: column name → list of ints, list of floats, int, float or str. All rows have the same columns."""

Kind = Literal["ints", "floats", "int", "float", "text"]

_DTYPES: dict[Kind, Any] = {
    "ints": np.int32,  # token ids, labels, masks
    "floats": np.float32,
    "int": np.int64,
    "float": np.float64,
    "text": np.uint8,  # UTF-8
}


def _kind(value: object) -> Kind:
    match value:
        case bool():
            raise AssertionError("encode booleans as ints")
        case int():
            return "int"
        case float():
            return "float"
        case str():
            return "text"
        case list():
            floats = any(isinstance(item, float) for item in cast(list[object], value))
            return "floats" if floats else "ints"
        case _:
            raise AssertionError(f"a table holds no {type(value).__name__}")


class _Column:
    def __init__(self, folder: Path, name: str, kind: Kind) -> None:
        self.kind: Kind = kind
        self.values: IO[bytes] = (folder / f"{name}.values").open("wb")
        self.offsets: list[int] = [0]
        self.offsets_path = folder / f"{name}.offsets"

    def add(self, value: Any) -> None:
        if self.kind == "text":
            data = np.frombuffer(value.encode(), dtype=np.uint8)
        else:
            data = np.atleast_1d(np.asarray(value, dtype=_DTYPES[self.kind]))
        data.tofile(self.values)
        self.offsets.append(self.offsets[-1] + len(data))

    def close(self) -> None:
        self.values.close()
        np.asarray(self.offsets, dtype=np.int64).tofile(self.offsets_path)


def write_table(
    folder: Path, rows: Iterable[Encoded], kinds: dict[str, Kind] | None = None
) -> dict[str, Kind]:
    """Writes the rows; `finish_table` then makes the folder readable. Kinds are those of the first row, or given
    (a list of numbers that may be empty in the first row has no kind of its own)."""
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, _Column] = {}
    try:
        for row in rows:
            if not columns:
                columns = {n: _Column(folder, n, (kinds or {}).get(n) or _kind(v)) for n, v in row.items()}
            assert row.keys() == columns.keys(), f"rows differ in columns: {row.keys()} and {columns.keys()}"
            for name, value in row.items():
                columns[name].add(value)
    finally:
        for column in columns.values():
            column.close()
    return {name: column.kind for name, column in columns.items()}


def finish_table(folder: Path, kinds: dict[str, Kind], meta: dict[str, Any]) -> None:
    """Writes `table.json`, last: a folder without it is not a table."""
    text = json.dumps({"format": 1, "kinds": kinds, "meta": meta}, ensure_ascii=False, indent=1)
    (folder / "table.json").write_text(text, encoding="utf-8")


class Table:
    """The rows of a finished table folder, read-only."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.kinds: dict[str, Kind] = about["kinds"]
        self.meta: dict[str, Any] = about["meta"]
        self._offsets: dict[str, NDArray[np.int64]] = {}
        self._values: dict[str, NDArray[Any]] = {}
        for name, kind in self.kinds.items():
            self._offsets[name] = np.fromfile(folder / f"{name}.offsets", dtype=np.int64)
            path = folder / f"{name}.values"
            dtype = _DTYPES[kind]
            # an empty file cannot be mapped
            empty = path.stat().st_size == 0
            self._values[name] = np.empty(0, dtype) if empty else np.memmap(path, dtype=dtype, mode="r")
        self._rows = len(next(iter(self._offsets.values()))) - 1 if self._offsets else 0

    def __len__(self) -> int:
        return self._rows

    def value(self, name: str, row: int) -> Any:
        """One cell: a NumPy view for lists, else a Python number or string."""
        start, stop = self._offsets[name][row], self._offsets[name][row + 1]
        cell = self._values[name][start:stop]
        match self.kinds[name]:
            case "text":
                return cell.tobytes().decode()
            case "int" | "float":
                return cell[0].item()
            case _:
                return cell

    def row(self, row: int) -> Encoded:
        return {name: self.value(name, row) for name in self.kinds}

    def lengths(self, name: str = "input_ids") -> NDArray[np.int64]:
        """The number of values in each row of a list column."""
        return np.diff(self._offsets[name])

    def column(self, name: str) -> list[Any]:
        return [self.value(name, row) for row in range(len(self))]
