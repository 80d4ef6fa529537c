"""State that is larger than one rank: what a rank writes of it, and how any number of ranks reads it back.

A sharding engine writes, per rank, the part of every tensor that the rank holds. Parts are known by the name of
the whole tensor, so that a run can be continued on another number of ranks, or by another engine. Files are those
of `tensors` (safetensors and JSON): no pickle, as torch's distributed checkpoints and DeepSpeed's have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tunesmith.checkpoint.tensors import decode, save_state


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor of `shape`. `start` int: the elements from there on, in C order, `data` being 1-D (as
    ZeRO cuts); a tuple: the box of `data`'s shape at these offsets (as DTensor cuts)."""

    data: Tensor
    shape: tuple[int, ...]
    start: int | tuple[int, ...]


State = dict[str, Any]
"""Name → whole tensor, Piece, number, …"""


def save_pieces(prefix: Path, state: Mapping[str, Any]) -> tuple[Path, Path]:
    """Writes a rank's state (nested dicts, Pieces among the values) to `{prefix}.json` and `.safetensors`."""
    return save_state(prefix, _plain(state))


def _plain(value: Any) -> Any:
    if isinstance(value, Piece):
        return {"piece": value.start, "shape": value.shape, "data": value.data}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return value


def nbytes(state: Any) -> int:
    """The bytes of the tensors in a rank's state; tied ones count once, as they are written."""
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        match value:
            case Piece(data=data):
                found[id(data)] = data.nbytes
            case Tensor():
                found[id(value)] = value.nbytes
            case Mapping():
                for inner in value.values():  # pyright: ignore[reportUnknownVariableType]
                    visit(inner)
            case _:
                pass

    visit(state)
    return sum(found.values())


def file_prefix(kind: str, rank: int, world_size: int) -> str:
    """`weights-00001-of-00004`: rank 1's part."""
    return f"{kind}-{rank:05d}-of-{world_size:05d}"


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a part of a tensor lies."""

    file: Any  # an open safetensors file
    name: str
    shape: tuple[int, ...]
    start: int | tuple[int, ...] | None  # None: the whole tensor

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


class Saved:
    """The parts of one kind of state (`weights`, `optimizer`) in a checkpoint, read when they are asked for."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._parts: dict[tuple[str, ...], list[_Stored]] = {}
        self._values: dict[tuple[str, ...], Any] = {}
        whole = folder / f"{kind}.json"
        files = [whole] if whole.exists() else sorted(folder.glob(f"{kind}-*-of-*.json"))
        assert files, f"{folder} has no {kind}"
        for file in files:
            tensors = safe_open(str(file.with_suffix(".safetensors")), framework="pt", device="cpu")
            skeleton = json.loads(file.read_text("ascii"))
            # the tensors themselves stay on the disk: their numbers in the file stand for them
            self._collect((), decode(skeleton, _Names()), tensors)

    def _collect(self, path: tuple[str, ...], node: Any, file: Any) -> None:
        match node:
            case {"piece": start, "shape": shape, "data": _Name(name)}:
                self._parts.setdefault(path, []).append(_Stored(file, name, shape, start))
            case _Name(name):
                shape = tuple(file.get_slice(name).get_shape())
                self._parts.setdefault(path, []).append(_Stored(file, name, shape, None))
            case dict():
                for key, inner in node.items():
                    self._collect((*path, key), inner, file)
            case _:
                self._values[path] = node

    def keys(self) -> set[tuple[str, ...]]:
        """The paths of all tensors and values."""
        return {*self._parts, *self._values}

    def leave_out(self, prefix: str) -> None:
        """From here on there is nothing whose name begins so."""
        for found in (self._parts, self._values):
            for path in [path for path in found if path[0].startswith(prefix)]:
                del found[path]

    def names(self) -> set[str]:
        return {path[0] for path in self.keys()}

    def nested(self, read: Callable[[str, str], Any]) -> dict[str, dict[str, Any]]:
        """name → key → what `read(name, key)` gives, for state of two levels."""
        found: dict[str, dict[str, Any]] = {}
        for name, key in sorted(self.keys()):
            found.setdefault(name, {})[key] = read(name, key)
        return found

    def inner(self, name: str) -> list[str]:
        """The keys under a name, of state of two levels."""
        return sorted(path[1] for path in self.keys() if path[0] == name)

    def is_tensor(self, *path: str) -> bool:
        return path in self._parts

    def value(self, *path: str) -> Any:
        """A number, string, … or a whole tensor."""
        return self._values[path] if path in self._values else self.whole(*path)

    def shape(self, *path: str) -> tuple[int, ...]:
        return self._parts[path][0].shape

    def whole(self, *path: str) -> Tensor:
        """The tensor put together from its parts, in memory of its own."""
        parts = self._parts[path]
        first = parts[0].read()
        if parts[0].start is None:
            return first.clone()
        whole = torch.empty(parts[0].shape, dtype=first.dtype)
        covered = 0
        for part in parts:
            data = part.read()
            covered += data.numel()
            _place(whole, data, part.start)
        assert covered == whole.numel(), f"{'.'.join(path)}: {covered} of {whole.numel()} elements are there"
        return whole

    def box(self, offsets: tuple[int, ...], sizes: tuple[int, ...], *path: str) -> Tensor:
        """The part of `sizes` at `offsets`."""
        for part in self._parts[path]:
            if part.start == offsets and part.file.get_slice(part.name).get_shape() == list(sizes):
                return part.read().clone()  # cut as it is needed: the others need not be read
        return self.whole(*path)[_slices(offsets, sizes)].clone()

    def run(self, start: int, count: int, *path: str) -> Tensor:
        """`count` elements from `start` on, in C order [count]."""
        for part in self._parts[path]:
            if part.start == start and part.file.get_slice(part.name).get_shape() == [count]:
                return part.read().clone()
        return self.whole(*path).reshape(-1)[start : start + count].clone()


def _place(whole: Tensor, data: Tensor, start: int | tuple[int, ...] | None) -> None:
    if isinstance(start, tuple):
        whole[_slices(start, tuple(data.shape))] = data
    elif start is not None:
        whole.view(-1)[start : start + data.numel()] = data


def _slices(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))


@dataclass(frozen=True, slots=True)
class _Name:
    """Stands for a tensor that was not read."""

    number: str


class _Names(dict[str, Any]):
    def __missing__(self, key: str) -> _Name:
        return _Name(key)
