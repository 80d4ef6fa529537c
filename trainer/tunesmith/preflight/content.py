"""Digests of what a run is made of: recipe, data, model files, our own code, prepared tables. They are compared
between nodes; only those of the weights that checkpoints leave out are stored, in these."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from tunesmith.data.rows import files_of
from tunesmith.errors import TunesmithError
from tunesmith.hub import resolve_path
from tunesmith.recipe import Recipe
from tunesmith.recipe.data import Data

WHOLE_BYTES = 2 * 2**30  # a larger file is hashed in blocks spread over it
_BLOCK = 2**20
_SPREAD = 512  # blocks of such a file: half a GiB
_SMALL = 32 * 2**20  # of a model's files: those of weights are known by their headers
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_PACKAGES = ("tunesmith", "tunesmith_kernels")


def digest_file(path: Path, whole_bytes: int = WHOLE_BYTES) -> str:
    """`size:sha256` of the content; beyond `whole_bytes` of the first, the last and evenly spread blocks. Raises
    OSError."""
    with path.open("rb") as file:
        count = os.fstat(file.fileno()).st_size
        if count <= whole_bytes:
            return f"{count}:{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}"
        digest = hashlib.sha256()
        for number in range(_SPREAD):
            file.seek((count - _BLOCK) * number // (_SPREAD - 1))
            digest.update(file.read(_BLOCK))
        return f"{count}:{digest.hexdigest()[:32]}"


def flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, JSON value) of everything in nested plain containers."""
    items: list[tuple[Any, Any]] = []
    match value:
        case dict():
            items = list(cast(dict[Any, Any], value).items())
        case list() | tuple():
            items = list(enumerate(cast(list[Any], value)))
        case _:
            yield key, json.dumps(value, ensure_ascii=False, default=str)
            return
    if not items:
        yield key, json.dumps(value)
    for name, inner in items:
        yield from flat(inner, f"{key}.{name}" if key else str(name))


def recipe_values(recipe: Recipe) -> dict[str, str]:
    """Every setting of the recipe, overrides and defaults included, by its dotted key."""
    return dict(sorted(flat(recipe.model_dump(mode="json"))))


def data_digests(recipe: Recipe, base: Path) -> dict[str, str]:
    """The files of `data`, by `data.SPLIT[i] NAME`. A source that cannot be read says so in place of a digest: its
    reading is another's fault to report, its difference between nodes is ours."""
    found: dict[str, str] = {}
    for data_key, data in recipe.each_data.items():
        found |= _digests_of(data, data_key, base)
    return found


def _digests_of(data: Data, data_key: str, base: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for split in ("train", "eval", "test"):
        for number, source in enumerate(getattr(data, split)):
            key = f"{data_key}.{split}[{number}]"
            try:
                for file in files_of(source, base):
                    root = (base / Path(source.path).expanduser()).absolute()
                    name = file.name if file.absolute() == root else file.absolute().relative_to(root)
                    found[f"{key} {name}"] = digest_file(file)
            except (TunesmithError, OSError) as error:
                found[f"{key} {source.path}"] = f"cannot be read ({_brief(error)})"
    return found


def model_digests(recipe: Recipe, base: Path) -> dict[str, str]:
    """The files of the model's and the tokenizer's folder by name; nothing for hub ids, which their revision names
    and the prepared data and the weights' shapes confirm."""
    found: dict[str, str] = {}
    for key in ("model_name_or_path", "tokenizer", "chat_template"):
        name = getattr(recipe.model, key)
        if not isinstance(name, str):
            continue
        try:
            place = Path(resolve_path(name, base)) if key != "chat_template" else base / name
            files = [place] if place.is_file() else sorted(place.iterdir()) if place.is_dir() else []
            for file in files:
                if file.is_file():
                    found[f"model.{key} {file.name}"] = _digest_model_file(file)
        except (TunesmithError, OSError) as error:
            found[f"model.{key} {name}"] = f"cannot be read ({_brief(error)})"
    return found


def weights_digests(recipe: Recipe, base: Path) -> dict[str, str]:
    """The weight files of the model's folder and of the adapters that it continues from, by name, from their content
    (blocks spread over a large one); nothing for hub ids. Raises OSError."""
    name = recipe.model.model_name_or_path
    folders = [] if name is None else [Path(resolve_path(name, base))]
    folders += [Path(adapter.path) for adapter in recipe.trainable.adapters if adapter.path is not None]
    return {
        f"{folder.name}/{file.name}": digest_file(file, _SMALL)
        for folder in folders
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if file.suffix in _WEIGHTS
    }


def _digest_model_file(file: Path) -> str:
    count = file.stat().st_size
    if file.suffix not in _WEIGHTS or count <= _SMALL:
        return digest_file(file)
    if file.suffix == ".safetensors":
        header = safetensors_header(file)
        return f"{count}:{hashlib.sha256(header).hexdigest()[:32]}"
    return f"{count}"


def safetensors_header(file: Path) -> bytes:
    """The JSON header: 8 bytes of its length (little-endian) and itself (safetensors' format). Raises OSError."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return opened.read(min(length, 2**28))


def code_digests() -> dict[str, str]:
    """Our own source files and templates, by their path in the package."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec is not None else []:
            for file in sorted([*Path(root).rglob("*.py"), *Path(root).rglob("*.jinja")]):
                name = f"{package}/{file.relative_to(root).as_posix()}"
                found[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return found


def table_digest(folder: Path) -> str:
    """Of a prepared table: what it was made from (the folder's name), its columns and all their bytes; not the paths
    of its sources, which may differ between nodes. Raises OSError."""
    about: Mapping[str, Any] = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    parts: dict[str, Any] = {"name": folder.name, "kinds": about["kinds"]}
    for file in sorted([*folder.glob("*.values"), *folder.glob("*.offsets")]):
        parts[file.name] = digest_file(file)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _brief(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]
