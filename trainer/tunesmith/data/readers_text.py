"""Rows from CSV, TSV, BIO columns and plain text. A reader yields (line, values): the 1-based line on which
the row begins, and its columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.opening import inner_name, open_text
from tunesmith.errors import DataError, Place
from tunesmith.recipe.data import Source

Numbered = tuple[int, dict[str, Any]]


def csv_rows(path: Path, source: Source) -> Iterator[Numbered]:
    """One row per record; values are text. Blank lines are no records."""
    records = _records(path, source)
    first = next(records, None)
    if first is None:
        return
    line, names = first
    if source.header:
        _check_header(names, Place(str(path), line))
    else:
        yield line, {str(i): value for i, value in enumerate(names)}
        names = [str(i) for i in range(len(names))]
    for line, values in records:
        if len(values) != len(names):
            shape = f"the header names {len(names)}" if source.header else f"the first row has {len(names)}"
            fix = "quote a field that holds the delimiter" if source.quoting else "mend the row"
            raise DataError(f"fields: {len(values)}, but {shape}: {fix}", Place(str(path), line))
        yield line, dict(zip(names, values, strict=True))


def _records(path: Path, source: Source) -> Iterator[tuple[int, list[str]]]:
    delimiter = source.delimiter or ("\t" if inner_name(path.name).endswith(".tsv") else ",")
    if len(delimiter) != 1 or delimiter in '\r\n"':
        raise DataError(f"{path}: delimiter: must be one character, not {delimiter!r}")
    # the csv module's own bound of 128 KiB is less than a document; it is a setting of the process
    csv.field_size_limit(2**31 - 1)
    quoting = csv.QUOTE_MINIMAL if source.quoting else csv.QUOTE_NONE
    with open_text(path, source.encoding, newline="") as file:
        # strict: without it an unclosed quote takes in the rest of the file as one field
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                record = next(reader, None)
            except csv.Error as error:
                fix = (
                    "close or double the quotes, or set `quoting: false`"
                    if source.quoting
                    else "mend the row"
                )
                what = str(error).replace("\t", "\\t")
                raise DataError(f"bad CSV: {what}: {fix}", Place(str(path), line)) from error
            if record is None:
                return
            if record:
                yield line, record


def _check_header(names: list[str], place: Place) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            what = f"columns {names.index(name) + 1} and {i + 1} have the same name"
            raise DataError(f"{what}: rename one, or set `header: false`", place, repr(name))


def text_rows(path: Path, source: Source) -> Iterator[Numbered]:
    """{text}: the whole file, its paragraphs (separated by blank lines), or its lines, blank ones too."""
    split_by = source.split_by
    if split_by == "auto":
        split_by = "file" if source.format == "text" else "line"
    lines = _lines(path, source.encoding)
    if split_by == "line":
        for number, line in lines:
            yield number, {"text": line.removesuffix("\n")}
    elif split_by == "file":
        yield 1, {"text": "".join(line for _, line in lines)}
    else:
        yield from _paragraphs(lines)


def _paragraphs(lines: Iterator[tuple[int, str]]) -> Iterator[Numbered]:
    begin, paragraph = 0, ""
    for number, line in lines:
        if line.strip():
            begin = begin if paragraph else number
            paragraph += line
        elif paragraph:
            yield begin, {"text": paragraph.removesuffix("\n")}
            paragraph = ""
    if paragraph:
        yield begin, {"text": paragraph.removesuffix("\n")}


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that end in "\\n", but perhaps for the last."""
    with open_text(path, encoding) as file:
        for number, line in enumerate(file, start=1):
            if "\0" in line:
                what = (
                    f"a NUL character: this is no text in {encoding}; set `encoding`, or leave the file out"
                )
                raise DataError(what, Place(str(path), number))
            yield number, line.replace("\r\n", "\n")


def bio_rows(path: Path, source: Source) -> Iterator[Numbered]:
    """{tokens, tags}, a row per sentence. Columns are separated by tabs, or by spaces in a line without one;
    a line of whitespace ends a sentence; a line that starts with "# " is a comment. `columns` of the source
    gives the 0-based columns of both, by default the first and the last. `tags` is left out of a sentence
    whose lines all have one column only, unless `columns` names the tags."""
    token_column, tag_column = _column(path, source, "tokens", 0), _column(path, source, "tags", -1)
    least = max(token_column, tag_column) + 1
    sentence: list[tuple[int, list[str]]] = []
    tabs = False
    for number, line in _lines(path, source.encoding):
        # between words separated by spaces, "# O" is a hash sign and its tag
        if line.startswith("# ") and (tabs or not sentence):
            continue
        if not line.strip():
            if sentence:
                yield _sentence(path, sentence, token_column, tag_column)
            sentence, tabs = [], False
            continue
        tabs = "\t" in line
        fields = [field.strip() for field in line.split("\t")] if tabs else line.split()
        if len(fields) < least:
            what = f"too few columns ({len(fields)}): `columns` names number {least - 1}, counted from 0"
            raise DataError(what, Place(str(path), number))
        sentence.append((number, fields))
    if sentence:
        yield _sentence(path, sentence, token_column, tag_column)


def _sentence(
    path: Path, sentence: list[tuple[int, list[str]]], token_column: int, tag_column: int
) -> Numbered:
    begin = sentence[0][0]
    tokens = [fields[token_column] for _, fields in sentence]
    if tag_column == -1 and all(len(fields) == 1 for _, fields in sentence):
        return begin, {"tokens": tokens}
    for number, fields in sentence:
        if tag_column == -1 and len(fields) == 1:
            raise DataError("too few columns (1): a token and a tag are two", Place(str(path), number))
        if not fields[tag_column]:
            raise DataError("the tag is empty", Place(str(path), number), "tags")
    return begin, {"tokens": tokens, "tags": [fields[tag_column] for _, fields in sentence]}


def _column(path: Path, source: Source, name: str, default: int) -> int:
    column = source.columns.get(name, default)
    if isinstance(column, int):
        return column
    if not isinstance(column, str) or not column.isdecimal():
        raise DataError(f"{path}: columns: {name}: must be a 0-based column number in quotes, not {column!r}")
    return int(column)
