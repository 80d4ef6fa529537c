"""What a linear loss is given: checked, and brought into the shape that the chunks take."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith_kernels.linear_loss.chunks import Problem
from tunesmith_kernels.linear_loss.rows import RowOptions

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: RowOptions,
    softcap: float | None,
) -> None:
    """Raises ValueError, with one line, for what no path computes."""
    check_head(hidden, weight, bias)
    soft = target.is_floating_point()
    expected = [*hidden.shape[:-1], weight.shape[0]] if soft else [*hidden.shape[:-1]]
    if list(target.shape) != expected:
        raise _error(f"target is {list(target.shape)}, hidden {list(hidden.shape)} asks for {expected}")
    if not soft and target.dtype != torch.int64:
        raise _error(f"target is int64 or floating, not {_name(target.dtype)}")
    if target.requires_grad:
        raise _error("target requires a gradient, which is not computed: detach it")
    if target.device != hidden.device:
        raise _error(f"target is on {target.device}, hidden on {hidden.device}")
    if not 0 <= options.label_smoothing < 1:
        raise _error(f"label_smoothing lies in [0, 1), not at {options.label_smoothing}")
    for name in ("z_loss", "focal_gamma"):
        if not 0 <= getattr(options, name) < math.inf:
            raise _error(f"{name} is finite and not negative, not {getattr(options, name)}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise _error(f"softcap is finite and positive, or None, not {softcap}")
    if not math.isfinite(options.scale) or options.scale == 0:
        raise _error(f"scale is finite and not 0, not {options.scale}")
    if soft and options.focal_gamma:
        raise _error("focal_gamma needs class targets: a distribution has no one probability to be sure of")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, whose: str = "") -> None:
    """Raises ValueError for hidden states and a head that do not fit each other. whose: goes before their names."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if hasattr(tensor, "to_local"):
            raise _error(
                f"{whose}{name} is a DTensor: gather it (full_tensor), or compute inside the sharded module"
            )
        if tensor.dtype not in _DTYPES:
            raise _error(
                f"{whose}{name} is {_name(tensor.dtype)}: a quantised head has to be dequantised first"
            )
        if tensor.device != hidden.device:
            raise _error(f"{whose}{name} is on {tensor.device}, hidden on {hidden.device}")
    if weight.ndim != 2 or weight.shape[0] < 2:
        raise _error(f"{whose}weight is [classes, features] with 2 classes or more, not {list(weight.shape)}")
    if hidden.ndim < 2 or hidden.shape[-1] != weight.shape[1]:
        raise _error(f"{whose}hidden is [..., {weight.shape[1]}] for this weight, not {list(hidden.shape)}")
    if bias is not None and list(bias.shape) != [weight.shape[0]]:
        raise _error(f"{whose}bias is [{weight.shape[0]}] for this weight, not {list(bias.shape)}")


def check_range(problem: Problem) -> None:
    """On the CPU, where it costs nothing: raises IndexError for a target that is no class. Fake tensors have none."""
    target = problem.target
    if torch.compiler.is_compiling() or type(target) is not Tensor:
        return
    if target.device.type != "cpu" or target.is_floating_point():
        return
    wrong = (target != problem.ignore_index) & ((target < 0) | (target >= problem.weight.shape[0]))
    if wrong.any():
        found = int(target[wrong][0])
        raise IndexError(f"linear loss: target {found} is not a class, 0 to {problem.weight.shape[0] - 1}")


def as_rows(hidden: Tensor) -> Tensor:
    """hidden [..., H] as [N, H], in the dtype that the product is computed in: autocast's where that is on."""
    device = hidden.device.type
    dtype = hidden.dtype
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return hidden.reshape(-1, hidden.shape[-1]).to(dtype).contiguous()


def flat_target(target: Tensor, hidden: Tensor) -> Tensor:
    """int64 [N] or fp32 (fp64 beside fp64) [N, V]."""
    if not target.is_floating_point():
        return target.reshape(-1).contiguous()
    return target.reshape(hidden.shape[0], target.shape[-1]).to(_number_dtype(hidden)).contiguous()


def constant(name: str, value: Tensor | None, shape: Sequence[int], hidden: Tensor) -> Tensor | None:
    """A weight that is not trained, flat, fp32 (fp64 beside fp64), on hidden's device. Raises ValueError."""
    if value is None:
        return None
    if list(value.shape) != list(shape):
        raise _error(f"{name} is {list(shape)}, not {list(value.shape)}")
    if value.requires_grad:
        raise _error(f"{name} requires a gradient, which is not computed: detach it")
    flat = value.reshape(-1) if shape else value
    return flat.to(hidden.device, _number_dtype(hidden), non_blocking=True).contiguous()


def _number_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _error(message: str) -> ValueError:
    return ValueError(f"linear loss: {message}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
