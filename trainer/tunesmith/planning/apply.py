"""Writing a row's settings into a copy of a recipe, its comments kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.errors import UserError
from tunesmith.planning.choose import Row
from tunesmith.recipe.load import load_recipe


def apply(recipe: Path, row: Row, target: Path) -> dict[str, Any]:
    """Copies the file `recipe` to the new file `target` with the row's strategy, micro-batch and checkpointing; what
    was written, by key. Raises UserError where `target` exists, lies in another
    folder or cannot be written."""
    from ruamel.yaml import YAML

    if target.absolute().parent != recipe.absolute().parent:
        raise UserError(
            f"--apply: write beside {recipe}, since the recipe's paths are relative to its folder: "
            f"--apply {recipe.with_name(target.name)}"
        )

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 2**16
    with recipe.open(encoding="utf-8-sig") as file:
        document = yaml.load(file)
    written = settings(row)
    for key, value in written.items():
        section, name = key.split(".")
        if section not in document:
            document[section] = {}
        document[section][name] = value
    if row.strategy == "fsdp2":
        document["parallel"].pop("shard_size", None)
    try:
        with target.open("x", encoding="utf-8") as file:
            yaml.dump(document, file)
    except FileExistsError:
        raise UserError(f"--apply: {target} exists already: name another file") from None
    except OSError as error:
        raise UserError(f"--apply: {target} cannot be written: {error.strerror}") from None
    load_recipe(target)
    return written


def settings(row: Row) -> dict[str, Any]:
    """A row as a recipe says it."""
    found: dict[str, Any] = {
        "parallel.strategy": row.setup.parallel.strategy,
        "training.per_device_train_batch_size": row.setup.rows,
        "model.gradient_checkpointing": row.setup.checkpointing,
    }
    size = getattr(row.setup.parallel, "shard_size", None)
    return found if size is None else found | {"parallel.shard_size": size}
