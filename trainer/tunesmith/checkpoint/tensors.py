"""State to disk and back without pickle: the tensors as safetensors, everything around them as JSON.

Tensors are written one at a time, straight to the file, so that saving needs no second copy of the state, and
a full disk is an `OSError` (the safetensors package builds all CPU copies first and hides the errno). The
format is https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, data); its package
reads the files back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import safe_open

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_state(prefix: Path, state: object) -> tuple[Path, Path]:
    """Writes `state` to the new files `{prefix}.json` and `{prefix}.safetensors` and returns their paths.

    `state` nests dicts (keys: str or int), lists and tuples of plain strided tensors (any device and shape,
    the dtypes of safetensors but complex), int, float, str, bool and None: what optimizers, schedules and
    random generators give as their state. Types are exact: a subclass (OrderedDict, numpy.float64,
    Parameter, DTensor), or any other type, is an AssertionError that names its place, since it would come
    back as something else. Raises OSError where the file system refuses.
    """
    tensors: dict[int, tuple[int, torch.Tensor]] = {}
    skeleton = _encode(state, "state", tensors)
    paths = Path(f"{prefix}.json"), Path(f"{prefix}.safetensors")
    with paths[0].open("x", encoding="ascii") as file:
        json.dump(skeleton, file, allow_nan=False)
    _write_safetensors(paths[1], [tensor for _, tensor in tensors.values()])
    return paths


def load_state(prefix: Path, map_location: torch.device | str = "cpu") -> Any:
    """Reads what `save_state` wrote: equal types, keys, order and bits, the tensors on `map_location`.

    A tensor that stood in several places is one tensor in all of them again; views that only shared memory
    come back as tensors of their own, contiguous. Python's float NaNs come back as `float("nan")`. Optimizers
    want "cpu": their `load_state_dict` moves what belongs on the parameter's device and leaves the rest.
    """
    with safe_open(f"{prefix}.safetensors", framework="pt", device=str(map_location)) as file:
        # the clone leaves the file's memory map, which would keep a pruned checkpoint's disk space in use
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return decode(json.loads(Path(f"{prefix}.json").read_text("ascii")), tensors)


def _encode(value: Any, where: str, tensors: dict[int, tuple[int, torch.Tensor]]) -> Any:
    """JSON for `value`: its own form where JSON has one, else an object of one key that names the type.
    Tensors are collected in `tensors` by identity, each with the number that is its name in the file."""
    kind = type(value)
    if kind in (NoneType, bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [_encode(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]
    if kind is tuple:
        return {"tuple": [_encode(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]}
    if kind is dict:
        for key in value:
            assert type(key) in (str, int), f"{where}: cannot save the key {key!r} of type {_name(key)}"
        return {"dict": [[key, _encode(item, f"{where}[{key!r}]", tensors)] for key, item in value.items()]}
    assert kind is torch.Tensor, f"{where}: cannot save a {_name(value)}"
    assert value.layout is torch.strided, f"{where}: cannot save a tensor of layout {value.layout}"
    assert value.dtype in _DTYPES, f"{where}: cannot save a tensor of {value.dtype}"
    assert not value.requires_grad, f"{where}: cannot save a tensor that requires a gradient"
    assert not value.is_meta, f"{where}: cannot save a tensor without data"
    return {"tensor": tensors.setdefault(id(value), (len(tensors), value))[0]}


def decode(node: Any, tensors: Mapping[str, Any]) -> Any:
    """The state that `node`, read from a `.json` file, describes, its tensors taken from `tensors` by number."""
    if isinstance(node, list):
        return [decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((tag, body),) = node.items()
    match tag:
        case "float":
            return float(body)
        case "tuple":
            return tuple(decode(item, tensors) for item in body)
        case "dict":
            return {key: decode(item, tensors) for key, item in body}
        case "tensor":
            return tensors[str(body)]
        case _:
            raise AssertionError(f"no such tag: {tag}")


def _write_safetensors(path: Path, tensors: list[torch.Tensor]) -> None:
    # widest elements first: readers that map the file need every tensor aligned to its element size
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    header: dict[str, Any] = {}
    end = 0
    for i in order:
        start, end = end, end + tensors[i].nbytes
        header[str(i)] = {
            "dtype": _DTYPES[tensors[i].dtype],
            "shape": list(tensors[i].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode("ascii")
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i in order:
            data = tensors[i].to("cpu").resolve_neg().contiguous().flatten().view(torch.uint8)
            file.write(data.numpy().data)


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
