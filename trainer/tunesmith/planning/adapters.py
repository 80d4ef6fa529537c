"""Low-rank adapters and NF4 bases, as far as memory can tell: modules of the shapes and with the saved tensors of
PEFT's and bitsandbytes', for models without weights. Recipes do not have them yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

_BLOCK = 64  # NF4: elements that share a scale (Dettmers et al. 2023)
_SCALES = 256  # double quantisation: 8-bit scales that share an fp32 one
_TABLES = 4 * (16 + 256 + 1)  # bytes per tensor: the codes of both quantisations and the offset


@dataclass(frozen=True, slots=True)
class Lora:
    """Adapters of rank `r` on the linear layers whose names end in one of `targets`; the rest is frozen."""

    r: int
    targets: tuple[str, ...]
    dropout: float = 0.0


def nf4_bytes(numel: int) -> int:
    """Of a tensor in NF4 with double quantisation: 4 bits an element, 8 bits a block of 64, 32 bits 256 blocks."""
    blocks = ceil(numel / _BLOCK)
    return ceil(numel / 2) + blocks + 4 * ceil(blocks / _SCALES) + _TABLES


class _Nf4Product(torch.autograd.Function):
    """The weight exists in the compute dtype for the product alone, in the forward and again in the backward
    (bitsandbytes.autograd.MatMul4Bit); nothing of the input is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        ctx.shape = shape
        return F.linear(x, torch.empty(shape, dtype=x.dtype, device=x.device), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return grad.matmul(torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device)), None, None


class Nf4Linear(nn.Module):
    """Stands for bitsandbytes' Linear4bit with `compute_dtype` bf16."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.shape = (base.out_features, base.in_features)
        numel = base.weight.numel()
        packed = torch.empty((ceil(numel / 2), 1), dtype=torch.uint8, device=base.weight.device)
        weight: Any = nn.Parameter(packed, requires_grad=False)
        weight.whole_shape, weight.stored_bytes = self.shape, nf4_bytes(numel)
        self.weight = weight
        self.bias: nn.Parameter | None = base.bias

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor | None = self.bias
        bias = None if bias is None else bias.to(torch.bfloat16)
        return _Nf4Product.apply(x.to(torch.bfloat16), self.shape, bias).to(x.dtype)  # type: ignore[no-any-return]


class LoraLinear(nn.Module):
    """Stands for PEFT's LoRA layer (Hu et al. 2021): base(x) + B(A(dropout(x))) × scaling, A and B in fp32."""

    def __init__(self, base: nn.Module, settings: Lora) -> None:
        super().__init__()
        self.base_layer = base
        shape = base.shape if isinstance(base, Nf4Linear) else tuple(base.weight.shape)  # type: ignore[union-attr]
        self.dropout = nn.Dropout(settings.dropout) if settings.dropout else nn.Identity()
        self.lora_A = nn.Linear(shape[1], settings.r, bias=False, device="meta")
        self.lora_B = nn.Linear(settings.r, shape[0], bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        if isinstance(self.base_layer, Nf4Linear):
            out = out.clone()  # as PEFT does over 4-bit layers
        adapted = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))) * 2.0
        if isinstance(self.base_layer, Nf4Linear):
            return out + adapted.to(out.dtype)
        return (out + adapted).to(out.dtype)


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(the holder, the name in it, the layer)"""
    for holder in list(model.modules()):
        for name, child in list(holder.named_children()):
            if isinstance(child, nn.Linear | Nf4Linear):
                yield holder, name, child


def quantise(model: Any) -> None:
    """Every linear layer but the head becomes an NF4 one, in place."""
    head = model.get_output_embeddings()
    for holder, name, layer in _linears(model):
        if layer is not head and isinstance(layer, nn.Linear):
            setattr(holder, name, Nf4Linear(layer))


def adapt(model: nn.Module, settings: Lora) -> None:
    """Freezes the model and puts adapters on it, in place."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for holder, name, layer in _linears(model):
        if name in settings.targets:
            setattr(holder, name, LoraLinear(layer, settings))
