"""Rows of a source, whatever it is: a file, a folder, a hub data set, a builtin source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.data.opening import data_files, kind_of
from tunesmith.data.readers import file_rows
from tunesmith.errors import DataError, MachineError, Place
from tunesmith.recipe.data import Source

_HUB = "hub:"
_BUILTIN = "builtin:"


@dataclass(frozen=True, slots=True)
class Row:
    """Columns and their values: text where the file has no types (CSV, plain text), else what JSON or Parquet
    hold. No two rows of a source share a place."""

    values: dict[str, Any]
    place: Place


def files_of(source: Source, base: Path) -> list[Path]:
    """The source's files, in the order in which they are read; none for hub and builtin sources. A relative
    path is relative to `base`, the recipe's folder. DataError where there is no such file or folder."""
    if source.path.startswith((_HUB, _BUILTIN)):
        return []
    return data_files(base / Path(source.path).expanduser())


def read_rows(source: Source, base: Path) -> Iterator[Row]:
    """The rows of a source, its constants added, at most `limit` of them. DataError with the place for a file
    that is not what it claims; MachineError where the hub cannot be reached."""
    files = files_of(source, base)
    _check_settings(source, files)
    if source.path.startswith(_HUB):
        rows = _hub_rows(source)
    elif source.path.startswith(_BUILTIN):
        from tunesmith.data import stdlib

        rows = _numbered(source.path, stdlib.rows(source.path.removeprefix(_BUILTIN)))
    else:
        rows = (row for file in files for row in _file_rows(file, source, alone=len(files) == 1))
    for row in islice(rows, source.limit):
        for column in source.constants:
            if column in row.values:
                raise DataError(
                    "a constant has the name of a column of the file: rename it", row.place, column
                )
        yield Row(row.values | source.constants, row.place)


def content_hash(source: Source, base: Path) -> str:
    """SHA-256 (hex) over what `read_rows` and `formats.examples` depend on: the contents and names of the
    files and the settings, not the folder that they lie in nor the weight. A hub data set stands for itself
    by the fingerprint of its revision and split, a builtin source by its own fingerprint. Raises as
    `read_rows` does."""
    contents: list[tuple[str, str]] = []
    if source.path.startswith(_HUB):
        dataset = _load_dataset(source)
        contents.append((source.path, dataset._fingerprint))
    elif source.path.startswith(_BUILTIN):
        from tunesmith import __version__
        from tunesmith.data import stdlib

        contents.append((__version__, stdlib.fingerprint(source.path.removeprefix(_BUILTIN))))
    root = base / Path(source.path).expanduser()
    for file in files_of(source, base):
        name = file.name if file == root else file.relative_to(root).as_posix()
        contents.append((name, _file_hash(file)))
    settings = source.model_dump(exclude={"path", "weight"})
    return hashlib.sha256(json.dumps([settings, contents], sort_keys=True).encode()).hexdigest()


def _file_hash(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def _check_settings(source: Source, files: list[Path]) -> None:
    """DataError for a setting without effect: what it is for is not there."""
    kinds = {kind_of(file) for file in files}
    text_files = "no text file" if files else "not a file"
    unused = {
        "delimiter": source.delimiter is not None and "csv" not in kinds and "no .csv or .tsv file",
        "header": not source.header and "csv" not in kinds and "no .csv or .tsv file",
        "quoting": not source.quoting and "csv" not in kinds and "no .csv or .tsv file",
        "split_by": source.split_by != "auto" and "text" not in kinds and "no plain-text file",
        "encoding": source.encoding != "utf-8" and kinds <= {"parquet"} and text_files,
        "split": source.split is not None and not source.path.startswith(_HUB) and "no hub data set",
    }
    for setting, why in unused.items():
        if why:
            raise DataError(f"{source.path}: {setting}: has no effect, there is {why}: leave the setting out")


def _file_rows(file: Path, source: Source, alone: bool) -> Iterator[Row]:
    # an empty text file among others is a document like them (a package's __init__.py)
    must_have_rows = alone or kind_of(file) != "text"
    if must_have_rows and file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty")
    place = None
    for number, values in file_rows(file, source):
        place = Place(str(file), number)
        yield Row(values, place)
    if place is None and must_have_rows:
        raise DataError(f"{file}: there are no rows in it")


def _numbered(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    return (Row(values, Place(name, number)) for number, values in enumerate(rows, start=1))


def _load_dataset(source: Source) -> Any:
    """A `datasets.Dataset`."""
    import datasets

    name = source.path.removeprefix(_HUB)
    try:
        return datasets.load_dataset(name, split=source.split or "train")
    except ConnectionError as error:
        raise MachineError(
            f"{source.path}: the hub cannot be reached: download the files and give their local path"
        ) from error
    except (FileNotFoundError, ValueError) as error:
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{source.path}: {what[0]}") from error


def _hub_rows(source: Source) -> Iterator[Row]:
    dataset = _load_dataset(source)
    names = {column: _label_names(feature) for column, feature in dataset.features.items()}
    coded = {column: labels for column, labels in names.items() if labels is not None}
    rows = ({**row, **{c: _decoded(row[c], labels) for c, labels in coded.items()}} for row in dataset)
    # two splits of a data set are two places
    return _numbered(f"{source.path}[{source.split or 'train'}]", rows)


def _label_names(feature: Any) -> list[str] | None:
    """The names behind a column of label numbers, or of lists of them."""
    import datasets

    inner = feature.feature if isinstance(feature, datasets.List) else feature
    return inner.names if isinstance(inner, datasets.ClassLabel) else None


def _decoded(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_decoded(one, names) for one in value]
    # the hub's test splits write -1 for a label that is kept secret
    return names[value] if value is not None and value >= 0 else None
