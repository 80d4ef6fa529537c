"""The autograd of linear losses, around the operator of each: `torch.ops.tunesmith.<operator>`, called with its tensors
(hidden, weight and bias first, the factor of the rows last), its numbers, and whether the gradients of hidden, weight
and bias are wanted. It returns the rows' losses without the factor, four statistics of the rows, and these gradients,
multiplied by the factor and still to be multiplied by `chunks.remaining`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tunesmith_kernels.linear_loss.backward import differentiable_once, is_one, scaled
from tunesmith_kernels.linear_loss.chunks import remaining


def apply(
    operator: str, reduction: str, tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """The loss, with gradient, and four statistics [N]. reduction: "sum": the loss is 0-dim; "none": [N]."""
    on = torch.is_grad_enabled()
    wanted = tuple(on and tensor is not None and tensor.requires_grad for tensor in tensors[:3])
    function = _Sum if reduction == "sum" else _Each
    return cast(tuple[Tensor, ...], function.apply(*tensors, operator, numbers, wanted))


def _call(operator: str, *args: Any) -> tuple[Tensor, ...]:
    return getattr(torch.ops.tunesmith, operator)(*args)


class _Sum(torch.autograd.Function):
    """Σ factor·loss, its gradients computed on the way."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, factor, operator, numbers, wanted = args
        ctx.set_materialize_grads(False)
        # fp16 has no exponents for 1 / (a million tokens): the factor waits for the caller's scale
        late = factor if tensors[0].dtype == torch.float16 else None
        losses, *rest = _call(operator, *tensors, None if late is not None else factor, *numbers, *wanted)
        stats, gradients = rest[:4], rest[4:]
        ctx.save_for_backward(*gradients, late)
        ctx.wanted, ctx.dtypes = wanted, [None if tensor is None else tensor.dtype for tensor in tensors[:3]]
        ctx.operator, ctx.arguments, ctx.spent = operator, len(args), False
        ctx.mark_non_differentiable(*stats)
        total = losses.sum()
        return total if factor is None else total * factor, *stats

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad: Tensor | None = grads[0]
        if grad is None:
            return (None,) * ctx.arguments
        *gradients, late = ctx.saved_tensors
        factor, rest = grad if late is None else grad * late, remaining(ctx.dtypes[0])
        if not torch.compiler.is_compiling():
            # torch notices by itself, but not where hooks hold the saved tensors, as for offloading
            if ctx.spent:
                raise RuntimeError(f"{ctx.operator}: a second backward: its gradients were scaled in place")
            ctx.spent = not is_one(factor, rest)
        found: list[Tensor | None] = []
        for wanted, dtype, gradient in zip(ctx.wanted, ctx.dtypes, gradients, strict=True):
            found.append(scaled(gradient, factor, rest).to(dtype) if wanted else None)
        return *found, *(None,) * (ctx.arguments - 3)


class _Each(torch.autograd.Function):
    """factor·loss of each row. Their upstream gradients are known in the backward only, which computes the logits a
    second time."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, operator, numbers, wanted = args
        ctx.set_materialize_grads(False)
        losses, *rest = _call(operator, *tensors, *numbers, False, False, False)
        ctx.save_for_backward(*tensors)
        ctx.operator, ctx.arguments, ctx.numbers, ctx.wanted = operator, len(args), numbers, wanted
        ctx.mark_non_differentiable(*rest[:4])
        return losses if tensors[-1] is None else losses * tensors[-1], *rest[:4]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad: Tensor | None = grads[0]
        if grad is None:
            return (None,) * ctx.arguments
        *tensors, factor = ctx.saved_tensors
        factor = grad.float() if factor is None else grad.float() * factor
        scale = None
        # fp16 has no exponents for a caller's 65536
        if tensors[0].dtype == torch.float16 and factor.numel():
            scale = factor.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
            factor, scale = factor / scale, scale * remaining(torch.float16)
        gradients = _call(ctx.operator, *tensors, factor, *ctx.numbers, *ctx.wanted)[5:]
        found: list[Tensor | None] = []
        for wanted, tensor, gradient in zip(ctx.wanted, tensors[:3], gradients, strict=True):
            exact = gradient if scale is None else gradient * scale
            found.append(exact.to(tensor.dtype) if wanted else None)
        return *found, *(None,) * (ctx.arguments - 3)
