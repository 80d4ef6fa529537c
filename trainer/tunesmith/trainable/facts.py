"""What the start-up report says of the parameters, group by group."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn

from tunesmith import optim
from tunesmith.shapes import whole_shape


def group_facts(module: nn.Module, spec: optim.Spec) -> list[dict[str, Any]]:
    """One row per group of the optimizer and dtype, then one per dtype of what is frozen: `tag`, `parameters`
    (elements), `trained_from` (how many steps are made before; None: never), `learning_rate` (before the schedule),
    `weight_decay`, `dtype` (a name of torch's; nf4, fp4 where bitsandbytes holds it), `shapes`, and for frozen ones
    `stored` (bytes). To be called before an engine prepares the module, on the same groups as it will."""
    rows: list[dict[str, Any]] = []
    for group in optim.parameter_groups(module, spec):
        for dtype, some in _by_dtype(group["params"]).items():
            about = {key: group[key] for key in ("tag", "weight_decay")}
            timing = {"trained_from": group["opens"], "learning_rate": group["lr"]}
            rows.append(about | timing | _sizes(some) | {"dtype": dtype})
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    for dtype, some in _by_dtype(frozen).items():
        about = {"tag": "frozen", "weight_decay": 0.0, "trained_from": None, "learning_rate": 0.0}
        stored = sum(whole_shape(p).numel() * p.element_size() for p in some)
        rows.append(about | _sizes(some) | {"dtype": dtype, "stored": stored})
    return rows


def _by_dtype(parameters: list[nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    found: dict[str, list[nn.Parameter]] = {}
    for parameter in parameters:
        quantised = getattr(parameter, "quant_type", None) if parameter.element_size() == 1 else None
        found.setdefault(quantised or str(parameter.dtype).removeprefix("torch."), []).append(parameter)
    return found


def _sizes(parameters: list[nn.Parameter]) -> dict[str, Any]:
    # where bitsandbytes holds two of four bits in a byte, its own state has the shape of the weight
    states = [getattr(parameter, "quant_state", None) for parameter in parameters]
    shapes = [
        tuple(whole_shape(p)) if state is None else tuple(state.shape)
        for p, state in zip(parameters, states, strict=True)
    ]
    return {"parameters": sum(prod(shape) for shape in shapes), "shapes": shapes}
