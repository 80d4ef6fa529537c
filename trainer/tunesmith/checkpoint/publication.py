"""Publication of a checkpoint: whole or not at all, on all ranks or on none.

Rank 0 makes `.checkpoint-N.tmp-*`; every rank writes, fsyncs and hashes its files there; rank 0 gathers the
hashes, writes and fsyncs the manifest and the folder, renames it, fsyncs the parent, and only then deletes
older checkpoints. A reader trusts no rename: a checkpoint counts if its manifest verifies. So whatever is
killed when, a whole checkpoint is there from the first publication on.

Publishing a step that is already there replaces it, whole or broken: the new one is what the run has now. No
rename swaps two folders on every file system, so the old one is first set aside as `.checkpoint-N.old-*`, and
`clean_leftovers` puts it back if the run was killed between the two renames.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import JsonValue
from safetensors import SafetensorError

from tunesmith import __version__
from tunesmith.checkpoint.manifest import FileRecord, Manifest, in_threads, record, write_manifest
from tunesmith.checkpoint.store import Pruned, hidden, prune
from tunesmith.errors import MachineError, TunesmithError

_T = TypeVar("_T")
# torch.save, and so DeepSpeed, raise RuntimeError on a full disk
_MACHINE_FAULTS = (OSError, SafetensorError, RuntimeError)

Writer = Callable[[Path], Iterable[Path]]
"""Writes new files directly into the folder it is given and returns their paths. Ranks share no file name."""


class Group(Protocol):
    """The ranks that save together. Every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def broadcast(self, obj: _T) -> _T:
        """Rank 0's object, on every rank."""
        ...

    def gather(self, obj: _T) -> list[_T]:
        """On rank 0 every rank's object, in the order of ranks; what the others get is not used."""
        ...

    def barrier(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SingleGroup:
    """One process."""

    rank: int = 0
    world_size: int = 1

    def broadcast(self, obj: _T) -> _T:
        return obj

    def gather(self, obj: _T) -> list[_T]:
        return [obj]

    def barrier(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Fault:
    line: str
    of_machine: bool


def publish(
    run_dir: Path,
    step: int,
    writers: Sequence[Writer],
    *,
    recipe_sha256: str,
    meta: dict[str, JsonValue],
    group: Group | None = None,
    bytes_needed: int | None = None,
    keep: int | None = None,
    protect: Collection[Path] = (),
) -> tuple[Path, Pruned]:
    """Publishes `run_dir/checkpoint-{step}`, then prunes. Called by all ranks, each with the writers of its
    own files and, where known, the bytes that they take (refused at once where the disk has less).
    `recipe_sha256` and `meta` are recorded in the manifest.

    Returns the path and, on rank 0, what `prune` did. Where the file system fails on any rank, every rank
    raises MachineError with the same line, the temporary folder is gone, earlier checkpoints are untouched.
    Any other exception of a writer is raised as it is on its rank, as TunesmithError on the others. A rank
    that dies shows as whatever `group` raises; what it leaves is removed by `clean_leftovers`.
    """
    group = group or SingleGroup()
    target = run_dir / f"checkpoint-{step}"
    needs = [need for need in group.gather(bytes_needed) if need is not None]
    needed = sum(needs) if needs else None
    name, error = _attempt(lambda: _reserve(target, needed)) if group.rank == 0 else (None, None)
    name, fault = group.broadcast((name, _fault(target, 0, error)))
    _raise_if(fault, error)
    assert name is not None
    folder = run_dir / name

    files, error = _attempt(lambda: _write(folder, writers))
    reports = group.gather((files, _fault(target, group.rank, error)))
    if group.rank == 0:
        assert len(reports) == group.world_size, f"{len(reports)} of {group.world_size} ranks reported"
        fault = next((fault for _, fault in reports if fault is not None), None)
        if fault is None:
            parts = [files or {} for files, _ in reports]
            _, error = _attempt(lambda: _commit(folder, target, step, parts, recipe_sha256, meta))
            fault = _fault(target, 0, error)
        if fault is not None:
            space, _ = _attempt(lambda: _discard(folder, needed))
            if fault.of_machine and space is not None:
                fault = replace(fault, line=f"{fault.line}; {space}")
    _raise_if(group.broadcast(fault), error)

    # nothing older may go until every rank knows that this one is there
    group.barrier()
    return target, prune(run_dir, keep, protect, fresh=target) if group.rank == 0 else Pruned()


def _reserve(target: Path, needed: int | None) -> str:
    """Makes the temporary folder and returns its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if needed is not None and needed > free:
        raise MachineError(f"{needed:,} bytes needed, {free:,} free")
    folder = hidden(target, "tmp")
    folder.mkdir()
    return folder.name


def _write(folder: Path, writers: Sequence[Writer]) -> dict[str, FileRecord]:
    if not folder.is_dir():
        raise MachineError(
            f"{folder} is not there, rank 0 made it: is the folder on a file system of all machines?"
        )
    paths: list[Path] = []
    for writer in writers:
        paths += writer(folder)
    for path in paths:
        assert path.parent == folder, f"{path} is not directly in {folder}"

    def seal(path: Path) -> FileRecord:
        _fsync(path)
        return record(path)

    return _union({path.name: sealed} for path, sealed in zip(paths, in_threads(seal, paths), strict=True))


def _commit(
    folder: Path,
    target: Path,
    step: int,
    parts: Sequence[dict[str, FileRecord]],
    recipe_sha256: str,
    meta: dict[str, JsonValue],
) -> None:
    manifest = Manifest(
        step=step,
        world_size=len(parts),
        versions={
            "tunesmith": __version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        recipe_sha256=recipe_sha256,
        files=_union(parts),
        meta=meta,
    )
    unlisted = set(os.listdir(folder)) - manifest.files.keys()
    assert not unlisted, f"written, but not returned by a writer: {sorted(unlisted)}"
    _fsync(write_manifest(folder, manifest))
    _fsync(folder)
    aside = hidden(target, "old") if target.exists() else None
    if aside:
        os.rename(target, aside)
    try:
        os.rename(folder, target)
    except OSError:
        if aside:
            os.rename(aside, target)
        raise
    _fsync(target.parent)
    if aside:
        # the new one is safe: what can't be removed now is removed at the next start
        shutil.rmtree(aside, ignore_errors=True)


def _discard(folder: Path, needed: int | None) -> str:
    """Removes the temporary folder (what can't be removed now is removed at the next start) and returns what
    space was needed and is free."""
    written = sum(entry.stat().st_size for entry in os.scandir(folder)) if folder.is_dir() else 0
    shutil.rmtree(folder, ignore_errors=True)
    need = f"{needed:,}" if needed is not None else f"more than {written:,}"
    return f"{need} bytes needed, {shutil.disk_usage(folder.parent).free:,} free"


def _attempt(action: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # noqa: BLE001 - the other ranks must hear of it, whatever it is; then it is raised
        return None, error


def _fault(target: Path, rank: int, error: Exception | None) -> _Fault | None:
    if error is None:
        return None
    what = str(error) if isinstance(error, TunesmithError) else f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.strerror:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    line = f"{target.name} was not saved in {target.parent}: rank {rank}: {what.splitlines()[0]}"
    return _Fault(line, of_machine=isinstance(error, _MACHINE_FAULTS))


def _raise_if(fault: _Fault | None, own: Exception | None) -> None:
    if fault is None:
        return
    if own is not None and not isinstance(own, _MACHINE_FAULTS):
        raise own
    raise (MachineError if fault.of_machine else TunesmithError)(fault.line) from own


def _union(parts: Iterable[dict[str, FileRecord]]) -> dict[str, FileRecord]:
    files: dict[str, FileRecord] = {}
    for part in parts:
        assert not files.keys() & part.keys(), f"written twice: {sorted(files.keys() & part.keys())}"
        files.update(part)
    return files


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
