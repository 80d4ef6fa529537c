"""Rows taken out of the training files for evaluation and test: a pure function of the rows and the seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from tunesmith.data.order import Salt, shuffled
from tunesmith.data.rows import read_rows
from tunesmith.errors import DataError, Place
from tunesmith.recipe.data import Data, Source, Split

Assignment = Callable[[Place], str]


def assign(data: Data, base: Path) -> Assignment:
    """Where each training row goes: "train", "eval" or "test"."""
    assert data.split is not None
    table = _assign(
        tuple(source.model_dump_json() for source in data.train), str(base), data.split.model_dump_json()
    )
    return lambda place: table[place.file, place.line]


@lru_cache(maxsize=2)
def _assign(sources: tuple[str, ...], base: str, split_json: str) -> dict[tuple[str, int], str]:
    split = Split.model_validate_json(split_json)
    column = split.stratify or split.group
    places: list[tuple[str, int]] = []
    values: list[str] = []
    for text in sources:
        source = Source.model_validate_json(text)
        for row in read_rows(source, Path(base)):
            places.append((row.place.file, row.place.line))
            if column is None:
                values.append("")
            elif column in row.values:
                values.append(str(row.values[column]))
            else:
                key = "stratify" if split.stratify else "group"
                raise DataError(f"data.split.{key}: there is no column {column!r}", row.place)
    blocks: dict[str, list[int]] = defaultdict(list)
    for i, value in enumerate(values):
        blocks[value].append(i)
    names = ["train"] * len(places)
    if split.group is None:
        for number, value in enumerate(sorted(blocks)):
            _deal(names, [[i] for i in blocks[value]], split, number)
    else:
        _deal(names, [blocks[value] for value in sorted(blocks)], split, 0)
    return dict(zip(places, names, strict=True))


def _deal(names: list[str], units: list[list[int]], split: Split, number: int) -> None:
    """Hands whole units (rows, or groups of rows) to test, then eval, until each has its share of the rows."""
    order = shuffled(np.arange(len(units), dtype=np.int64), split.seed, number, Salt.SPLIT)
    total = sum(len(unit) for unit in units)
    wanted = {"test": round(total * split.test), "eval": round(total * split.eval)}
    for i in order:
        for name, rows in wanted.items():
            if rows > 0 and rows >= len(units[i]) / 2:
                for row in units[i]:
                    names[row] = name
                wanted[name] -= len(units[i])
                break
