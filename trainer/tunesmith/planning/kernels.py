"""What runs in place of this machine's own kernels where a plan is for another device or engine, as far as they keep
other tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class _Zero3Linear(torch.autograd.Function):
    """What DeepSpeed's stage 3 makes of every linear layer (deepspeed/runtime/zero/linear.py): input and weight are
    kept as they came, not as autocast made them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.autocast = (torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type))
        out = x.matmul(weight.t())
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight, bias = ctx.saved_tensors
        enabled, dtype = ctx.autocast
        with torch.autocast(grad.device.type, dtype=dtype, enabled=enabled):
            flat = grad.reshape(-1, grad.shape[-1])
            of_x = grad.matmul(weight) if ctx.needs_input_grad[0] else None
            of_weight = flat.t().matmul(x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
            of_bias = flat.sum(0) if bias is not None and ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias


def _zero3_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Zero3Linear.apply(x, weight, bias)  # type: ignore[no-any-return]


def _fused_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA keeps a mask of one byte an element, the CPU one as wide as the element."""
    if not training or p == 0.0:
        return x
    return torch.native_dropout(x, p, True)[0]


_sdpa = F.scaled_dot_product_attention


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """CUDA's fused attention drops out within the kernel; the CPU's takes no dropout and would fall back to one that
    keeps all weights. What both keep is alike: query, key, value, output and a number per row."""
    return _sdpa(query, key, value, *args, **(kwargs | {"dropout_p": 0.0}))


@contextlib.contextmanager
def kernels_of(*, zero3: bool, cuda: bool) -> Generator[None]:
    """Within it the model computes as on the device and under the engine that are planned for."""
    replaced: dict[str, Callable[..., Any]] = {}
    if zero3:
        replaced["linear"] = _zero3_linear
    if cuda:
        replaced |= {"dropout": _fused_dropout, "scaled_dot_product_attention": _fused_attention}
    functions: Any = F
    original = {name: getattr(functions, name) for name in replaced}
    for name, function in replaced.items():
        setattr(functions, name, function)
    try:
        yield
    finally:
        for name, function in original.items():
            setattr(functions, name, function)
