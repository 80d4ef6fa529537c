"""What a step multiplies the gradients by, and whether it is made: the optimizer's own clipping, or what an engine sets
on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from tunesmith_kernels.adamw.local import local
from tunesmith_kernels.adamw.tensors import Path


@dataclass(frozen=True)
class Scaling:
    """coefficient, skip: 0-dim fp32 on the gradients' device, for `Path.update`. norm: before clipping, None where the
    optimizer does not clip."""

    coefficient: Tensor
    skip: Tensor
    norm: Tensor | None


def scaling(optimizer: Optimizer, max_norm: float | None, grads: Sequence[Tensor], way: Path) -> Scaling:
    """By `max_norm`, or by the attributes `grad_scale` and `found_inf` of torch's fused optimizers. Never waits for
    the device. Raises ValueError where both are set."""
    grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    if max_norm is not None:
        if grad_scale is not None or found_inf is not None:
            raise ValueError("max_norm cannot be used where an engine sets grad_scale or found_inf")
        norm = way.norm(grads)
        coefficient, skip = way.clip(norm, max_norm)
        return Scaling(coefficient, skip, norm)
    device = grads[0].device
    one, zero = torch.ones((), device=device), torch.zeros((), device=device)
    return Scaling(
        one if grad_scale is None else local(grad_scale).float().reshape(()).reciprocal(),
        zero if found_inf is None else local(found_inf).float().reshape(()),
        None,
    )
