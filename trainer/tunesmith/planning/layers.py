"""The repeated layers of a model: where they are, which are of one kind, and a model with one of each kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

_INDEX_NAMES = {"layer_idx", "layer_id", "layer_index", "training"}


@dataclass(frozen=True, slots=True)
class Stack:
    """A list of like layers in the model. `kept` are the layers that stand for all: the first, the last (each has
    another neighbour than the rest), and one of each kind in between; `represented[i]` is the place in `kept` of the
    layer that stands for layer i."""

    name: str
    depth: int
    kept: tuple[int, ...]
    represented: tuple[int, ...]


def find_stacks(model: nn.Module) -> list[Stack]:
    """Every outermost ModuleList of two or more layers of one class that have parameters, in the order of the
    forward as far as the order of definition tells."""
    stacks: list[Stack] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if any(name.startswith(f"{stack.name}.") for stack in stacks):
            continue
        layers = list(module)
        alike = len({type(layer) for layer in layers}) == 1
        if alike and any(True for _ in layers[0].parameters()):
            stacks.append(_stack(name, layers))
    return stacks


def _stack(name: str, layers: list[nn.Module]) -> Stack:
    kinds, last = [_kind(layer) for layer in layers], len(layers) - 1
    of_kind = {kind: i for i, kind in reversed(list(enumerate(kinds))) if 0 < i < last}
    kept = sorted({0, last, *of_kind.values()})
    inner = (kept.index(of_kind[kind]) for kind in kinds[1:last])
    represented = [0, *inner, len(kept) - 1]
    return Stack(name, len(layers), tuple(kept), tuple(represented))


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What distinguishes layers of one class: the shapes and the training of their parameters, and plain attributes
    such as the type of the attention."""
    shapes = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in layer.named_parameters())
    plain = tuple(
        (name, key, value)
        for name, part in layer.named_modules()
        for key, value in vars(part).items()
        if key not in _INDEX_NAMES
        and not key.startswith("_")
        and isinstance(value, str | bool | int | float | None)
    )
    return shapes, plain


def uncut(stacks: Sequence[Stack]) -> list[Stack]:
    """The same stacks with every layer standing for itself."""
    return [Stack(s.name, s.depth, tuple(range(s.depth)), tuple(range(s.depth))) for s in stacks]


def layer_modules(model: nn.Module, stacks: Sequence[Stack]) -> Iterator[tuple[Stack, list[nn.Module]]]:
    """Each stack with its layers as they are in the model now."""
    for stack in stacks:
        found = model.get_submodule(stack.name)
        assert isinstance(found, nn.ModuleList)
        yield stack, list(found)


def cut(model: Any, stacks: Sequence[Stack]) -> None:
    """Leaves only the layers that stand for the others, in place, and says so in the config."""
    for stack in stacks:
        path, _, leaf = stack.name.rpartition(".")
        holder = model.get_submodule(path)
        layers = getattr(holder, leaf)
        setattr(holder, leaf, nn.ModuleList(layers[i] for i in stack.kept))
        for config in {id(c): c for c in _configs(model)}.values():
            _shorten(config, stack)


def _configs(model: nn.Module) -> Iterator[Any]:
    for part in model.modules():
        if hasattr(part, "config"):
            yield part.config


def _shorten(config: Any, stack: Stack) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == stack.depth:
            setattr(config, name, [value[i] for i in stack.kept])
    for name in ("num_hidden_layers", "num_layers", "n_layer"):
        if getattr(config, name, None) == stack.depth:
            setattr(config, name, len(stack.kept))
