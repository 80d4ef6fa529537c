"""What the backwards of linear losses share: gradients that are there already are scaled, and not differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's once_differentiable, which without this raises only where the upstream gradient is itself differentiable:
    otherwise a gradient penalty on this loss would be taken for a constant, without a word."""
    once = once_differentiable(backward)

    def marked(ctx: Any, grad: Tensor | None, *grads: Tensor | None) -> Any:
        if grad is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grad = grad if grad.requires_grad else grad.detach().requires_grad_()
        return once(ctx, grad, *grads)

    return marked


def scaled(gradient: Tensor, grad: Tensor, remaining: float) -> Tensor:
    """gradient × grad × remaining, in gradient's own memory where that is worth it: a head's gradient may be the
    largest tensor of the step. torch raises at a second backward then, since a saved tensor was written to."""
    if torch.compiler.is_compiling():
        return gradient * (grad * remaining)
    return gradient if is_one(grad, remaining) else gradient.mul_(grad * remaining)


def is_one(grad: Tensor, remaining: float) -> bool:
    """Whether nothing is to be scaled, where that can be asked without waiting for a device or, of a fake tensor, at
    all."""
    return type(grad) is Tensor and grad.device.type == "cpu" and grad.item() * remaining == 1.0
