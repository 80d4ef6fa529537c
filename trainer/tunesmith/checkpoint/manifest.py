"""`manifest.json`: what a checkpoint consists of, and whether it still does.

A checkpoint is whole if its manifest is there, is unchanged since it was written (it carries its own sha256)
and every file that it lists has the size and sha256 that it lists. A hash finds damage; it doesn't stop
somebody who rewrites files and manifest together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    JsonValue,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

_T = TypeVar("_T")
_FILE = "manifest.json"


def _plain(name: str) -> str:
    """Refuses what could lead out of the folder, on any operating system."""
    if name in ("", ".", "..", _FILE) or any(mark in name for mark in '/\\:"\0'):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileRecord(_Model):
    """A file's size in bytes and the sha256 of its content, hexadecimal."""

    size: NonNegativeInt
    sha256: str


class Manifest(_Model):
    """What rank 0 writes last into a checkpoint. `meta` is the caller's."""

    format: Literal[1] = 1
    step: NonNegativeInt
    world_size: PositiveInt
    versions: dict[str, str]
    recipe_sha256: str
    files: dict[Annotated[str, AfterValidator(_plain)], FileRecord]
    meta: dict[str, JsonValue]


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Writes the new file `manifest.json` in `folder`, with its own hash, and returns its path."""
    body = manifest.model_dump()
    path = folder / _FILE
    with path.open("x", encoding="ascii") as file:
        json.dump({**body, "sha256": _digest(body)}, file, indent=1, allow_nan=False)
        file.write("\n")
    return path


def inspect(folder: Path, *, hashes: bool = True) -> tuple[Manifest | None, list[str]]:
    """The manifest of the checkpoint in `folder` (None where it can't be trusted) and everything that is
    wrong, a line each that begins with the file's name. Without `hashes` file contents are not read. Files
    that the manifest does not list are not looked at. Symbolic links are refused: nothing here writes any."""
    try:
        if not S_ISDIR(folder.lstat().st_mode):
            return None, [f"{folder.name}: not a folder"]
        if not S_ISREG((folder / _FILE).lstat().st_mode):
            return None, [f"{_FILE}: not a regular file"]
        manifest = _parse((folder / _FILE).read_bytes())
    except FileNotFoundError:
        return None, [f"{_FILE}: missing"]
    except OSError as error:
        return None, [f"{_FILE}: {error.strerror}"]
    except ValueError as error:
        return None, [f"{_FILE}: {error}"]
    if folder.name != f"checkpoint-{manifest.step}":
        return None, [f"{_FILE}: belongs to step {manifest.step}"]
    found = in_threads(lambda item: _compare(folder / item[0], item[1], hashes), manifest.files.items())
    return manifest, [problem for problem in found if problem is not None]


def record(path: Path) -> FileRecord:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(size=file.tell(), sha256=digest)


def in_threads(function: Callable[[Any], _T], items: Iterable[Any]) -> list[_T]:
    """`function` of every item, in order. For hashing and fsync, which leave the interpreter lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def _parse(text: bytes) -> Manifest:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(body, dict) or body.pop("sha256", None) != _digest(body):
        raise ValueError("edited or damaged (its own sha256 does not match)")
    try:
        return Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _digest(body: Any) -> str:
    """Of the content, not of the bytes: what is hashed is exactly what is read."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode("ascii")).hexdigest()


def _compare(path: Path, expected: FileRecord, hashes: bool) -> str | None:
    try:
        stat = path.lstat()
        if not S_ISREG(stat.st_mode):
            return f"{path.name}: not a regular file"
        if stat.st_size != expected.size:
            return f"{path.name}: {stat.st_size:,} bytes instead of {expected.size:,}"
        if hashes and record(path) != expected:
            return f"{path.name}: damaged (its sha256 does not match)"
    except FileNotFoundError:
        return f"{path.name}: missing"
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None
