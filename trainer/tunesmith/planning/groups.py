"""What each group of parameters takes on one device: weights, gradients, the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from tunesmith.planning.beside import per_weight
from tunesmith.planning.optimizers import BF16_STATE_BYTES, state_bytes
from tunesmith.planning.quantised import eight_bit_bytes, four_bit_bytes
from tunesmith.recipe import Recipe
from tunesmith.recipe.parallel import FSDP2, Auto, Parallel, Zero1, Zero2, Zero3
from tunesmith.recipe.quantization import FourBit

_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
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
    name of torch's, or nf4, fp4, int8) and `shapes`, of its tensors (tunesmith.trainable.facts). A row has `weights`,
    `gradients` and `optimizer` instead of the shapes: bytes on one device. `recipe.parallel` is a strategy, not auto.

    Gradients are counted when all are there, before the step; gathers, buffers and activations are no group's.
    """
    held = _held(recipe.parallel, world_size)
    rows = [_row(group, held, recipe) for group in groups]
    amounts = ("parameters", "weights", "gradients", "optimizer")
    return [*rows, {"tag": "sum", **{name: sum(row[name] for row in rows) for name in amounts}}]


def _row(group: Mapping[str, Any], held: _Held, recipe: Recipe) -> Row:
    numel, dtype = int(group["parameters"]), str(group["dtype"])
    weights = _stored(group, recipe)
    found = {"tag": group["tag"], "parameters": numel, "dtype": dtype}
    found |= {name: group.get(name) for name in ("trained_from", "learning_rate", "weight_decay")}
    gradients = state = 0
    if group.get("trained_from") is not None:
        shapes = [tuple(shape) for shape in group["shapes"]]
        rounded = BF16_STATE_BYTES.get(recipe.training.precision)
        whole = state_bytes(recipe.optim, shapes) if rounded is None else rounded * numel
        gradients = ceil(weights * held.gradients)
        state = ceil((whole + (held.copy + per_weight(recipe)) * numel) * held.state)
    return found | {"weights": ceil(weights * held.weights), "gradients": gradients, "optimizer": state}


def _stored(group: Mapping[str, Any], recipe: Recipe) -> int:
    """Bytes of the whole weights, scales and tables of quantised ones included."""
    settings = recipe.model.quantization
    match str(group["dtype"]):
        case "nf4" | "fp4":
            assert isinstance(settings, FourBit), "4-bit weights come from model.quantization alone"
            nested = settings.double_quant
            return sum(four_bit_bytes(prod(shape), double_quant=nested) for shape in group["shapes"])
        case "int8":
            return sum(eight_bit_bytes(*shape) for shape in group["shapes"])
        case dtype:
            return int(group["parameters"]) * _WIDTHS[dtype]


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
