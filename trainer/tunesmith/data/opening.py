"""Data files as they lie on disk: which kind a name means, folders, gzip, encodings. Every fault is a
DataError that names the file and the fix."""

from __future__ import annotations

import codecs
import difflib
import gzip
import io
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO

from tunesmith.errors import DataError, Place

Kind = Literal["json", "jsonl", "csv", "parquet", "bio", "text"]

_KINDS: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".conll": "bio",
    ".iob2": "bio",
    ".bio": "bio",
    ".iob": "bio",
}
BIO_SUFFIXES = tuple(suffix for suffix, kind in _KINDS.items() if kind == "bio")
_PACKED = {".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
_ABOUT_THE_DATA = ("readme", "license", "licence")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing where no name is near."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def inner_name(file: str) -> str:
    """The file's name in lower case, without `.gz`."""
    return file.lower().removesuffix(".gz")


def kind_of(path: Path) -> Kind:
    """What the suffix says; unknown suffixes are plain text. DataError for archives."""
    suffix = Path(inner_name(path.name)).suffix
    if suffix in _PACKED:
        raise DataError(f"{path}: archives are not read ({suffix}): unpack it and name its files or folder")
    return _KINDS.get(suffix, "text")


def data_files(path: Path) -> list[Path]:
    """The file itself, or all files of a folder and its subfolders, sorted, without hidden ones and without
    README and LICENSE, whatever their suffix. DataError where there are none."""
    try:
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise _not_found(path)
        files = list(_walk(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not files:
        raise DataError(f"{path}: the folder has no data files")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name.lower().split(".")[0] in _ABOUT_THE_DATA:
            continue
        if entry.is_dir():
            if folder.resolve().is_relative_to(entry.resolve()):
                raise DataError(f"{entry}: the folder links back to a folder around it: remove the link")
            yield from _walk(entry)
        elif entry.is_file():
            yield entry
        else:
            raise DataError(f"{entry}: neither a file nor a folder, perhaps a broken link: remove it")


def _not_found(path: Path) -> DataError:
    missing = path
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    names = [entry.name for entry in missing.parent.iterdir()] if missing.parent.is_dir() else []
    what = "no such file or folder" if missing == path else f"there is no folder {missing}"
    return DataError(f"{path}: {what}{did_you_mean(missing.name, names)}")


@contextmanager
def open_bytes(path: Path) -> Generator[io.BufferedReader | gzip.GzipFile]:
    """The file's bytes, gunzipped where the name ends in `.gz`. DataError for what goes wrong while it is
    read."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except EOFError as error:
        raise DataError(f"{path}: the gzip file is cut off: copy or download it again") from error
    except zlib.error as error:
        raise DataError(f"{path}: the gzip file is damaged: copy or download it again") from error
    except gzip.BadGzipFile as error:
        if "Not a gzipped file" in str(error):
            raise DataError(f"{path}: not a gzip file: take .gz off its name or compress it") from error
        raise DataError(f"{path}: the gzip file is damaged: copy or download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextmanager
def open_text(path: Path, encoding: str, newline: str = "\n") -> Generator[TextIO]:
    """The file's text. A byte order mark is taken off. Lines end at `\\n` alone by default, so that numbers
    agree with what editors and `wc` count. DataError for an unknown encoding and for bytes that it does not
    have."""
    codec = _codec(path, encoding)
    try:
        with open_bytes(path) as file:
            yield io.TextIOWrapper(file, encoding=codec, newline=newline)
    except UnicodeError as error:
        raise _undecodable(path, encoding) from error


def _codec(path: Path, encoding: str) -> str:
    try:
        io.TextIOWrapper(io.BytesIO(), encoding=encoding)  # refuses codecs that are no text encodings, too
    except LookupError as error:
        raise DataError(f"{path}: encoding: there is no text encoding {encoding!r}, such as utf-8") from error
    return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding


def _undecodable(path: Path, encoding: str) -> DataError:
    # a second pass, because the first decodes in chunks whose offsets say nothing about the file
    decoder = codecs.getincrementaldecoder(encoding)()
    line, offset, start = 1, 0, b""
    with open_bytes(path) as file:
        while True:
            chunk = file.read(1 << 20)
            start = start or chunk[:2]
            pending = len(decoder.getstate()[0])
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                line += error.object[: error.start].decode(encoding, errors="replace").count("\n")
                offset += error.start - pending
                byte = error.object[error.start]
                break
            except UnicodeError as error:  # UTF-16 without its byte order mark, where the codec wants one
                return DataError(f"{path}: not {encoding}: {error}")
            assert chunk, "the second pass must fail where the first did"
            offset += len(chunk)
    fix = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1"
    return DataError(
        f"byte 0x{byte:02x} at offset {offset} is not {encoding}: name the file's own encoding, "
        f"such as `encoding: {fix}`",
        Place(str(path), line),
    )
