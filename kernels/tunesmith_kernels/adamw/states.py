"""What the optimizer keeps per parameter, in torch.optim.AdamW's names: made, and taken from a state dict as it is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith_kernels.adamw.tensors import Precision

# what torch.optim.AdamW's groups hold beyond ours
_TORCH_ONLY = ("foreach", "capturable", "differentiable", "amsgrad", "maximize", "decoupled_weight_decay")


def precision_of(param: Tensor, precision: Precision) -> Precision:
    """How this parameter is updated: one of fp32 as fp32, whatever the optimizer's precision."""
    return "fp32" if param.dtype == torch.float32 else precision


@functools.cache
def dtypes(precision: Precision, state_dtype: torch.dtype) -> Mapping[str, torch.dtype]:
    """The names and types of the state of one parameter, `step` aside. state_dtype: of the moments, where the
    precision is `stochastic`."""
    match precision:
        case "fp32":
            return {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
        case "master":
            return {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "master": torch.float32}
        case "stochastic":
            return {"exp_avg": state_dtype, "exp_avg_sq": state_dtype}
        case "kahan":
            return {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16, "compensation": torch.bfloat16}


def new_state(param: Tensor, kinds: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The state before the first update; DTensors where the parameter is one."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}
    for name, dtype in kinds.items():
        if name == "master":
            state[name] = param.detach().to(dtype)
        else:
            state[name] = torch.zeros_like(param, dtype=dtype)
    return state


@dataclass(frozen=True)
class Kept:
    """A tensor that torch's `load_state_dict` passes on as it is: it casts those that it sees to the parameter's
    type, and would round masters and fp32 moments of bf16 parameters."""

    tensor: Tensor


def kept(
    param: Tensor, saved: Mapping[str, Any], kinds: Mapping[str, torch.dtype], label: str
) -> dict[str, Any]:
    """The saved state of `param`, on its device and in its memory layout. Raises ValueError where it is not a state
    of these types or of this parameter's shape."""
    if not saved:
        return {}
    found = {name: value.dtype for name, value in saved.items() if name != "step"}
    if found != dict(kinds) or "step" not in saved:
        raise ValueError(
            f"{label}: the saved state has {_listed(found)}, this precision keeps {_listed(kinds)}"
        )
    state: dict[str, Any] = {}
    for name in kinds:
        value: Tensor = saved[name]
        if value.shape != param.shape:
            raise ValueError(
                f"{label}: {name} was saved as {tuple(value.shape)}, is {tuple(param.shape)} here"
            )
        value = value.to(device=param.device)
        if value.stride() != param.stride():
            value = torch.empty_like(param, dtype=value.dtype).copy_(value)
        state[name] = Kept(value)
    step = torch.as_tensor(saved["step"], dtype=torch.float32, device=param.device)
    return {"step": Kept(step), **state}


def _listed(kinds: Mapping[str, torch.dtype]) -> str:
    return (
        ", ".join(f"{name} ({str(dtype).removeprefix('torch.')})" for name, dtype in kinds.items())
        or "nothing"
    )


def adopted_group(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A group of a state dict, ours or torch.optim.AdamW's, as ours. Raises ValueError where torch's asks for what is
    not offered here."""
    for name in ("amsgrad", "maximize"):
        if saved.get(name):
            raise ValueError(f"the saved optimizer has {name}=True, which this AdamW does not offer")
    if not saved.get("decoupled_weight_decay", True):
        raise ValueError("the saved optimizer is Adam with L2 weight decay, not AdamW")
    return {name: value for name, value in saved.items() if name not in _TORCH_ONLY} | {"fused": True}
