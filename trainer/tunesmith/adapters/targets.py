"""Which modules of a model an adapter takes hold of: checked by name before PEFT looks for them, which asks only that
something matches."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import nn

from tunesmith.adapters.configs import Task, key
from tunesmith.errors import UserError
from tunesmith.recipe.adapters import Adapter

ALL_LINEAR = "all-linear"
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # PEFT's: the first number in a name is its layer
_HEADED: frozenset[Task] = frozenset({"sequence", "token", "question_answering"})


def linear_names(model: Any) -> list[str]:
    """Every linear layer (also Conv1D and quantised ones) but the output head."""
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    ]


def resolve(adapter: Adapter, config: Any, model: Any, whole: Collection[str]) -> None:
    """Checks every name in PEFT's config against the model, in place: `all-linear`, and whatever is restricted to some
    layers, becomes a list of whole names. `whole`: the modules that some adapter trains whole, which all-linear leaves
    out. Raises UserError for a name that matches nothing."""
    names = [name for name, _ in model.named_modules() if name]
    asked = getattr(config, "target_modules", None)
    prefix = key(adapter)
    saved = getattr(config, "modules_to_save", None) or []
    _each(f"{prefix}.modules_to_save", saved, names)
    if asked is not None:
        hold = linear_names(model) if asked == ALL_LINEAR else _each(f"{prefix}.target_modules", asked, names)
        if asked == ALL_LINEAR:
            hold = [name for name in hold if not any(_within(name, part) for part in whole)]
            config.target_modules = set(hold)
        layers = getattr(config, "layers_to_transform", None)
        if layers is not None:
            hold = _in_layers(f"{prefix}.layers_to_transform", hold, layers)
            config.target_modules, config.layers_to_transform = set(hold), None
        left_out = getattr(config, "exclude_modules", None)
        if left_out and not isinstance(left_out, str):
            left_out = sorted(left_out)
        if left_out:
            _each(f"{prefix}.exclude_modules", left_out, hold)
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, name, None) or {}:
                if not any(re.match(rf"(.*\.)?({pattern})$", one) for one in hold):
                    raise UserError(f"{prefix}.{name}: {pattern} is none of the modules{near(pattern, hold)}")
    if (inputs := getattr(config, "feedforward_modules", None)) is not None:
        _each(f"{prefix}.feedforward_modules", inputs, names)


def _within(name: str, part: str) -> bool:
    return re.match(rf"(^|.*\.){re.escape(part)}($|\..*)", name) is not None


def _each(where: str, asked: str | Iterable[str], names: Collection[str]) -> list[str]:
    """The names that match: a regular expression wholly, or one of the endings. All of these must match something."""
    if isinstance(asked, str):
        try:
            found = [name for name in names if re.fullmatch(asked, name)]
        except re.error as error:
            raise UserError(f"{where}: {asked} is no regular expression: {error}") from None
        if not found:
            raise UserError(f"{where}: {asked} matches no module{near(asked, names)}")
        return found
    found: list[str] = []
    for ending in sorted(asked):
        hits = [name for name in names if name == ending or name.endswith(f".{ending}")]
        if not hits:
            raise UserError(f"{where}: the model has no {ending}{near(ending, names)}")
        found += hits
    return found


def _in_layers(where: str, names: Iterable[str], layers: int | Sequence[int]) -> list[str]:
    asked = {layers} if isinstance(layers, int) else set(layers)
    numbered = {name: int(found[1]) for name in names if (found := _LAYER.match(name))}
    if missing := asked - set(numbered.values()):
        have = f"0 to {max(numbered.values())}" if numbered else "none"
        raise UserError(
            f"{where}: there is no layer {min(missing)} among the target modules (layers: {have})"
        )
    return [name for name, layer in numbered.items() if layer in asked]


def near(asked: str, names: Collection[str]) -> str:
    """The endings of module names that look like what was asked for."""
    endings = {".".join(parts[-n:]) for name in names for parts in [name.split(".")] for n in (1, 2)}
    words = sorted(one for one in endings if not one.isdigit())
    close = difflib.get_close_matches(asked, words, 3, 0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    leaves = sorted({name.rpartition(".")[2] for name in names} - {""})
    return f"; it has {', '.join([one for one in leaves if not one.isdigit()][:12])}"


def head_modules(model: Any, task: Task, new_weights: Collection[str]) -> tuple[list[str], list[str]]:
    """(modules, notes): what must be trained and saved whole beside any adapter: a classifier's head, which is all
    that the model has beside its backbone, and modules whose weights were drawn at random as the model was loaded."""
    found: list[str] = []
    notes: list[str] = []
    if task in _HEADED:
        backbone = model.base_model_prefix
        found = [
            name
            for name, child in model.named_children()
            if name != backbone and any(True for _ in child.parameters())
        ]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for parameter in new_weights:
        owner = parameter.rpartition(".")[0]
        if not owner or any(_inside(owner, one) for one in found):
            continue
        module: nn.Module = model.get_submodule(owner)
        if output is not None and any(part is output for part in module.modules()):
            # drawn as zeros, and part of a module whose weight is the embedding: not worth a copy of that
            notes.append(
                f"{parameter} is new, and stays as it is: an adapter cannot hold it apart from its head"
            )
            continue
        found.append(owner)
    return found, notes


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def tied(model: Any) -> bool:
    """Whether the output head's weight is the embedding's."""
    find: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    embedding = model.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


def sharing(model: Any) -> list[str]:
    """The modules whose weight is the input embedding's, where there are several."""
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if weight is None:
        return []
    modules = model.named_modules(remove_duplicate=False)
    found = [name for name, module in modules if module._parameters.get("weight") is weight]
    return found if len(found) > 1 else []
