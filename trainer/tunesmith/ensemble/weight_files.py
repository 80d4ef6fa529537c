"""Weights in safetensors, read and written a tensor at a time: averages of models that do not fit into memory
together, or alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import MachineError, UserError

_BYTES = torch.uint8


class WeightFiles:
    """The tensors in a folder's safetensors files, by name; to be closed (a context manager)."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise UserError(f"{folder}: holds no safetensors files")
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        for path in self.files:
            try:
                file: Any = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                self._stack.close()
                raise UserError(f"{path}: cannot be read: {error}") from None
            self._open |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def __getitem__(self, name: str) -> Tensor:
        return self._open[name].get_tensor(name)

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Each tensor's dtype and shape."""
        slices = {name: file.get_slice(name) for name, file in self._open.items()}
        return {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}


def refuse_other_layout(
    ours: WeightFiles, theirs: WeightFiles, names: tuple[str, str], *, dtypes: bool = True
) -> None:
    """Raises UserError where the tensors of `theirs` have not the names, shapes and dtypes of `ours`; `names` are what
    to call the two."""
    a, b = ours.layout(), theirs.layout()
    if differ := sorted(a.keys() ^ b.keys()):
        holder = names[0] if differ[0] in a else names[1]
        raise UserError(f"{names[1]}: is not the model of {names[0]}: {holder} alone has {differ[0]}")
    for name, (dtype, shape) in a.items():
        if b[name][1] != shape:
            raise UserError(
                f"{names[1]}: {name} has shape {list(b[name][1])}, that of {names[0]} {list(shape)}"
            )
        if dtypes and b[name][0] != dtype:
            raise UserError(f"{names[1]}: {name} is {b[name][0]}, that of {names[0]} {dtype}")


def write_like(source: Path, target: Path, make: Callable[[str], Tensor]) -> None:
    """Writes the folder `target`'s safetensors files with the names, dtypes and order of those of `source`, and the
    values that `make(name)` gives, which is asked for one tensor at a time. Raises MachineError."""
    for path in sorted(source.glob("*.safetensors")):
        header, entries = _header(path)
        try:
            with (target / path.name).open("wb") as out:
                out.write(struct.pack("<Q", len(header)) + header)
                for name, about in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0]):
                    value = make(name).contiguous()
                    assert list(value.shape) == about["shape"], f"{name} has shape {list(value.shape)}"
                    data = value.view(-1).view(_BYTES).numpy()
                    begin, end = about["data_offsets"]
                    assert len(data) == end - begin, f"{name} is {value.dtype}"
                    out.write(data.data)
        except OSError as error:
            raise MachineError(f"{target}: cannot be written: {error.strerror or error}") from None


def _header(path: Path) -> tuple[bytes, Mapping[str, Any]]:
    """The header of a safetensors file: its bytes, and the entries that it describes."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = file.read(length)
    entries: dict[str, Any] = json.loads(header)
    entries.pop("__metadata__", None)
    return header, entries
