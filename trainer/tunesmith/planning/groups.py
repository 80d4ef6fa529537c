"""What each group of parameters takes on one device: weights, gradients, the optimizer's state."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from torch import Tensor, nn

from tunesmith.planning.optimizers import BF16_STATE_BYTES, state_bytes
from tunesmith.recipe import Recipe
from tunesmith.recipe.parallel import FSDP2, Auto, Parallel, Zero1, Zero2, Zero3
from tunesmith.shapes import whole_shape

_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Held:
    """Shares of a whole that one device holds; `copy`: bytes of a second copy of each weight that is trained."""

    weights: float = 1.0
    gradients: float = 1.0
    state: float = 1.0
    copy: int = 0


def memory_table(groups: Sequence[Mapping[str, Any]], recipe: Recipe, world_size: int) -> list[Row]:
    """One row for each group and a last one, tagged "sum", for all. A group has `tag`, `parameters` (elements),
    `trained_from` (an optimizer step, 0: from the start; None: never), `learning_rate`, `weight_decay`, `dtype` (a
    name of torch's, or nf4, fp4), and where it is known `shapes`, of its tensors, and `stored` (bytes of the whole
    weights; else by dtype). A row adds `weights`, `gradients` and `optimizer` in bytes on one device, and leaves
    `shapes` and `stored` out. `recipe.parallel` is a strategy, not auto.

    Gradients are counted when all are there, before the step; gathers, buffers and activations are no group's.
    """
    held = _held(recipe.parallel, world_size)
    rows = [_row(group, held, recipe) for group in groups]
    amounts = ("parameters", "weights", "gradients", "optimizer")
    return [*rows, {"tag": "sum", **{name: sum(row[name] for row in rows) for name in amounts}}]


def _row(group: Mapping[str, Any], held: _Held, recipe: Recipe) -> Row:
    numel, dtype = int(group["parameters"]), str(group["dtype"]).removeprefix("torch.")
    stored = group.get("stored")
    weights = numel * _WIDTHS[dtype] if stored is None else int(stored)
    found = {"tag": group["tag"], "parameters": numel, "dtype": dtype}
    found |= {name: group.get(name) for name in ("trained_from", "learning_rate", "weight_decay")}
    gradients = state = 0
    if group.get("trained_from") is not None:
        shapes = [tuple(shape) for shape in group.get("shapes") or [(numel,)]]
        rounded = BF16_STATE_BYTES.get(recipe.training.precision)
        whole = state_bytes(recipe.optim, shapes) if rounded is None else rounded * numel
        gradients = ceil(weights * held.gradients)
        state = ceil((whole + held.copy * numel) * held.state)
    return found | {"weights": ceil(weights * held.weights), "gradients": gradients, "optimizer": state}


def _held(parallel: Parallel, world_size: int) -> _Held:
    """As the plan has it (planning/whole.py, sharded.py, zero.py), but for padding."""
    assert not isinstance(parallel, Auto), "auto is no strategy yet"
    part = 1 / world_size
    match parallel:
        case FSDP2(offload=True):
            return _Held(0.0, 0.0, 0.0)
        case FSDP2(shard_size=size):
            part = 1 / (size or world_size)
            return _Held(part, part, part)
        case Zero1(offload_optimizer=away):
            return _Held(state=0.0 if away else part, copy=4)
        case Zero2(offload_optimizer=away):
            return _Held(gradients=part, state=0.0 if away else part, copy=4)
        case Zero3(offload_optimizer=away, offload_parameters=all_away):
            return _Held(0.0 if all_away else part, part, 0.0 if away else part, 4)
        case _:
            return _Held()


def untrained(model: nn.Module, trained: Collection[str]) -> list[dict[str, Any]]:
    """Groups, as `memory_table` takes them, of the parameters whose names are not among `trained` (at any time):
    "frozen" by dtype, "quantised" by kind. To be called before an engine shards the model."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    names = set(trained)
    for name, parameter in model.named_parameters():
        if name in names:
            continue
        kind = quantised_as(parameter)
        key = ("frozen", str(parameter.dtype).removeprefix("torch.")) if kind is None else ("quantised", kind)
        empty = {"tag": key[0], "parameters": 0, "trained_from": None, "dtype": key[1], "stored": 0}
        group = found.setdefault(key, empty)
        group["parameters"] += prod(shape_of(parameter))
        group["stored"] += stored_bytes(parameter)
    return list(found.values())


def quantised_as(parameter: nn.Parameter) -> str | None:
    """nf4, fp4 or int8, where bitsandbytes (or a plan's stand-in) holds it so."""
    if (kind := getattr(parameter, "quantised_as", None)) is not None:
        return str(kind)
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return str(state.quant_type)
    return "int8" if getattr(parameter, "SCB", None) is not None else None


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """As it is computed with, whatever holds it."""
    if (shape := getattr(parameter, "whole_shape", None)) is not None:
        return tuple(shape)
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return tuple(state.shape)
    return tuple(whole_shape(parameter))


def stored_bytes(parameter: nn.Parameter) -> int:
    """Of the whole parameter, the scales and tables of a quantised one included."""
    if (given := getattr(parameter, "stored_bytes", None)) is not None:
        return int(given)
    tensors = [*_tensors(getattr(parameter, "quant_state", None)), getattr(parameter, "SCB", None)]
    more = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return prod(whole_shape(parameter)) * parameter.element_size() + more


def _tensors(state: Any) -> Iterator[Tensor]:
    """Of bitsandbytes' QuantState: scales, the code that stands for them, and with double quantisation theirs."""
    if state is None:
        return
    for name in ("absmax", "code", "offset"):
        if isinstance(value := getattr(state, name, None), Tensor):
            yield value
    yield from _tensors(getattr(state, "state2", None))
