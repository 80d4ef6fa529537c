"""The checkpoints of a run, `checkpoint-N/` folders in its folder: which one to resume from, which may go,
what a killed run left behind. `publication` writes them."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tunesmith.checkpoint.manifest import Manifest, inspect
from tunesmith.errors import MachineError

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_LEFTOVER = re.compile(r"\.(checkpoint-[0-9]+)\.(tmp|old)-[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Broken:
    """A checkpoint that can't be used or deleted, and why, in one line."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint. Read only files that `manifest.files` lists: the others were not verified."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Found:
    """The newest whole checkpoint (None: there is none) and the newer ones that were skipped."""

    latest: Checkpoint | None
    skipped: tuple[Broken, ...]


@dataclass(frozen=True, slots=True)
class Pruned:
    """What pruning deleted, and what it met that was broken or could not be deleted."""

    deleted: tuple[Path, ...] = ()
    left: tuple[Broken, ...] = ()


def find_latest(run_dir: Path) -> Found:
    """The newest whole checkpoint of a run, every byte of it verified. Broken ones on the way are named and
    skipped, never deleted. With several ranks: call on rank 0 after `clean_leftovers`, and broadcast."""
    skipped: list[Broken] = []
    for path in _newest_first(run_dir):
        manifest, problems = inspect(path)
        if manifest is not None and not problems:
            return Found(Checkpoint(path, manifest), tuple(skipped))
        skipped.append(Broken(path, "; ".join(problems)))
    return Found(None, tuple(skipped))


def verify(path: Path) -> list[str]:
    """What is wrong with the checkpoint in `path`, one line per file; nothing if it is whole."""
    return inspect(path)[1]


def prune(
    run_dir: Path, keep: int | None, protect: Collection[Path] = (), *, fresh: Path | None = None
) -> Pruned:
    """Deletes the checkpoints older than the newest `keep` whole ones (None: deletes nothing) but those in
    `protect` (the best one), which are kept beyond `keep`. Called by rank 0, after publication only.

    Broken checkpoints do not count as kept and are left where they are. The kept ones are hashed again, so
    that damage since their publication is not counted on, except `fresh`, which was hashed a moment ago and
    is never deleted. Those that go need not be whole, but must be ours: manifest, names and sizes are right.
    """
    if keep is None:
        return Pruned()
    assert keep >= 1, "a run keeps at least one checkpoint"
    safe = {path.resolve() for path in (*protect, *([fresh] if fresh else []))}
    whole = 0
    deleted: list[Path] = []
    left: list[Broken] = []
    for path in _newest_first(run_dir):
        enough = whole >= keep
        _, problems = inspect(path, hashes=not enough and path != fresh)
        if problems:
            left.append(Broken(path, "; ".join(problems)))
        elif not enough:
            whole += 1
        elif path.resolve() not in safe:
            try:
                # renamed first: a deletion that is cut short leaves no half checkpoint under its name
                doomed = hidden(path, "tmp")
                os.rename(path, doomed)
                shutil.rmtree(doomed)
                deleted.append(path)
            except OSError as error:
                left.append(Broken(path, f"could not be deleted: {error}"))
    return Pruned(tuple(deleted), tuple(left))


def clean_leftovers(run_dir: Path) -> tuple[Path, ...]:
    """Removes what a killed run left half written or half deleted, puts back a checkpoint that it had set
    aside, and returns the hidden folders that are gone. Called by rank 0 before anything is read or
    published, while no other process uses the folder. Raises MachineError."""
    gone: list[Path] = []
    for path in sorted(run_dir.iterdir()) if run_dir.is_dir() else ():
        if match := _LEFTOVER.fullmatch(path.name):
            target = run_dir / match[1]
            try:
                if match[2] == "old" and not target.exists():
                    os.rename(path, target)
                else:
                    shutil.rmtree(path)
            except OSError as error:
                raise MachineError(
                    f"{path}: cannot clean up what an earlier run left: {error.strerror}"
                ) from error
            gone.append(path)
    return tuple(gone)


def _newest_first(run_dir: Path) -> list[Path]:
    found = [path for path in run_dir.iterdir() if _NAME.fullmatch(path.name)] if run_dir.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def hidden(target: Path, kind: str) -> Path:
    """A new name beside `target` that no reader takes for a checkpoint and that `clean_leftovers` knows:
    `tmp` is removed, `old` is put back where `target` is missing."""
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")
