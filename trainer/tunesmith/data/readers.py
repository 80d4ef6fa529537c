"""Rows from JSON, JSON lines and Parquet, and the choice of the reader. A reader yields (line, values): the
1-based line on which the row begins, or its number where the file has no lines for it; no two rows of a file
share one."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.opening import kind_of, open_bytes, open_text
from tunesmith.data.readers_text import Numbered, bio_rows, csv_rows, text_rows
from tunesmith.errors import DataError, Place
from tunesmith.recipe.data import Source

_SPACE = re.compile(r"[ \t\r\n]*")
_JSON = json.JSONDecoder()


def file_rows(path: Path, source: Source) -> Iterator[Numbered]:
    """The rows of one file, read as its suffix says. Raises DataError."""
    match kind_of(path):
        case "json":
            return _json_rows(path, source)
        case "jsonl":
            return _jsonl_rows(path, source)
        case "csv":
            return csv_rows(path, source)
        case "parquet":
            return _parquet_rows(path)
        case "bio":
            return bio_rows(path, source)
        case "text":
            return text_rows(path, source)


def _jsonl_rows(path: Path, source: Source) -> Iterator[Numbered]:
    with open_text(path, source.encoding) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise _bad_json(path, error, number) from error
                yield number, _object(path, number, value)


def _json_rows(path: Path, source: Source) -> Iterator[Numbered]:
    with open_text(path, source.encoding) as file:
        text = file.read()
    try:
        elements = _rows_of_document(path, text)
    except json.JSONDecodeError as error:
        raise _bad_json(path, error, error.lineno) from error
    if elements is None:
        yield from _jsonl_rows(path, source)
    elif source.format == "squad":
        yield from _squad_rows(path, elements)
    else:
        for number, value in _numbered(text, elements):
            yield number, _object(path, number, value)


def _rows_of_document(path: Path, text: str) -> list[tuple[int, Any]] | None:
    """(position, element) of the list that the document is, or of the one list that its object holds. None
    for several objects one after the other: JSON lines under another name."""
    start = _skip(text, 0)
    if text.startswith("[", start):
        elements, end = _elements(text, start)
    elif text.startswith("{", start):
        lists, end = _lists(text, start)
        if text.startswith("{", _skip(text, end)):
            return None
        if len(lists) != 1:
            there = f"several lists ({', '.join(lists)})" if lists else "no list"
            raise DataError(f"{path}: must be a list of rows, or an object with one list; it has {there}")
        (elements,) = lists.values()
    else:
        value, _ = _JSON.raw_decode(text, start)
        raise DataError(f"{path}: must be a list of rows, not {_json_type(value)}")
    if _skip(text, end) < len(text):
        raise json.JSONDecodeError("Extra data", text, _skip(text, end))
    return elements


def _elements(text: str, start: int) -> tuple[list[tuple[int, Any]], int]:
    """(position, value) of each element of the list that opens at `start`, and the position after the
    list."""
    found: list[tuple[int, Any]] = []
    position = _skip(text, start + 1)
    if text.startswith("]", position):
        return found, position + 1
    while True:
        value, end = _JSON.raw_decode(text, position)
        found.append((position, value))
        end = _skip(text, end)
        if text.startswith("]", end):
            return found, end + 1
        position = _after(",", text, end)


def _lists(text: str, start: int) -> tuple[dict[str, list[tuple[int, Any]]], int]:
    """The lists that are values of the object that opens at `start`, and the position after the object."""
    found: dict[str, list[tuple[int, Any]]] = {}
    position = _skip(text, start + 1)
    if text.startswith("}", position):
        return found, position + 1
    while True:
        if not text.startswith('"', position):
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, position)
        key, end = _JSON.raw_decode(text, position)
        position = _after(":", text, _skip(text, end))
        if text.startswith("[", position):
            found[key], end = _elements(text, position)
        else:
            _, end = _JSON.raw_decode(text, position)
        end = _skip(text, end)
        if text.startswith("}", end):
            return found, end + 1
        position = _after(",", text, end)


def _skip(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    assert space is not None
    return space.end()


def _after(mark: str, text: str, position: int) -> int:
    if not text.startswith(mark, position):
        raise json.JSONDecodeError(f"Expecting {mark!r} delimiter", text, position)
    return _skip(text, position + 1)


def _numbered(text: str, elements: list[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    starts = [0, *(position for position, _ in elements)]
    breaks = [text.count("\n", before, after) for before, after in itertools.pairwise(starts)]
    # rows that share a line (a file without line breaks) are told apart by their number instead
    numbers = (
        range(1, len(elements) + 1) if 0 in breaks[1:] else (1 + n for n in itertools.accumulate(breaks))
    )
    return ((number, value) for number, (_, value) in zip(numbers, elements, strict=True))


def _squad_rows(path: Path, elements: list[tuple[int, Any]]) -> Iterator[Numbered]:
    """SQuAD's articles → paragraphs → questions, flattened, each with the context of its paragraph; rows that
    are questions already are left as they are. The number is the question's."""
    number = itertools.count(1)
    for index, (_, article) in enumerate(elements, start=1):
        if not (isinstance(article, dict) and "paragraphs" in article):
            n = next(number)
            yield n, _object(path, n, article)
            continue
        for paragraph in _objects(path, index, article, "paragraphs"):
            context = {"context": paragraph["context"]} if "context" in paragraph else {}
            for question in _objects(path, index, paragraph, "qas"):
                yield next(number), context | question


def _objects(path: Path, article: int, parent: dict[str, Any], key: str) -> list[dict[str, Any]]:
    values = parent.get(key)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise DataError(f"{path}: article {article}: `{key}` must be a list of objects")
    return values


def _object(path: Path, number: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"a row must be an object, not {_json_type(value)}", Place(str(path), number))
    return value


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _bad_json(path: Path, error: json.JSONDecodeError, line: int) -> DataError:
    return DataError(f"bad JSON at column {error.colno}: {error.msg}", Place(str(path), line))


def _parquet_rows(path: Path) -> Iterator[Numbered]:
    import pyarrow
    import pyarrow.parquet

    number = itertools.count(1)
    with open_bytes(path) as file:
        try:
            # gzip streams cannot be read from their end, where Parquet keeps its schema, at a sane cost
            whole = pyarrow.BufferReader(file.read()) if path.suffix.lower() == ".gz" else file
            for batch in pyarrow.parquet.ParquetFile(whole).iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    yield next(number), values
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{path}: not a Parquet file, or a damaged one: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
