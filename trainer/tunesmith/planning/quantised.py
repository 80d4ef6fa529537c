"""Quantised linear layers as far as memory can tell: modules of the sizes and with the saved tensors of bitsandbytes',
for models without weights."""

from __future__ import annotations

from math import ceil
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tunesmith.recipe.quantization import EightBit, FourBit, Quantization

_BLOCK = 64  # 4 bits: elements that share a scale (Dettmers et al. 2023)
_SCALES = 256  # double quantisation: 8-bit scales that share an fp32 one
_CODE = 4 * 16  # bytes per tensor: the 16 numbers that 4 bits stand for,
_CODE_OF_SCALES = 4 * (256 + 1)  # and with double quantisation the 256 of the scales, and their mean
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def four_bit_bytes(numel: int, *, double_quant: bool = True) -> int:
    """Of a tensor in 4 bits: half a byte an element and an fp32 scale a block of 64; with double quantisation 8 bits a
    block, and 32 bits 256 blocks."""
    blocks = ceil(numel / _BLOCK)
    scales = blocks + 4 * ceil(blocks / _SCALES) + _CODE_OF_SCALES if double_quant else 4 * blocks
    return ceil(numel / 2) + scales + _CODE


def eight_bit_bytes(rows: int, columns: int) -> int:
    """An fp32 scale a row."""
    return rows * columns + 4 * rows


class _FourBitProduct(torch.autograd.Function):
    """The weight exists in the compute dtype for the product alone, in the forward and again in the backward
    (bitsandbytes.autograd.MatMul4Bit); nothing of the input is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        ctx.shape = shape
        return F.linear(x, torch.empty(shape, dtype=x.dtype, device=x.device), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, Tensor | None]:
        (grad,) = grads
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return grad.matmul(torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device)), None, of_bias


class _EightBitProduct(torch.autograd.Function):
    """bitsandbytes keeps the input (autograd.MatMul8bitFp on the CPU, MatMul8bitLt elsewhere), and makes the weight in
    the input's dtype for the product: on the CPU in the forward too, elsewhere that is computed on int8 rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], bias: Tensor | None, cuda: bool) -> Tensor:
        ctx.shape, ctx.x = shape, x
        if cuda:
            rows = x.to(torch.float16)
            # held until the product is done
            _held = rows, torch.empty(x.shape, dtype=torch.int8, device=x.device)
            return x.new_empty((*x.shape[:-1], shape[0]))
        return F.linear(x, torch.empty(shape, dtype=x.dtype, device=x.device), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, Tensor | None, None]:
        (grad,) = grads
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        flat = grad.reshape(-1, grad.shape[-1])
        weight = torch.empty(ctx.shape, dtype=ctx.x.dtype, device=grad.device)
        return flat.to(ctx.x.dtype).matmul(weight).view(ctx.x.shape), None, of_bias, None


class QuantisedLinear(nn.Linear):
    """Stands for the layers of tunesmith.quantization. PEFT takes it for a linear layer; `adapted`: it is the base of
    an adapter, which PEFT lets work on a copy of a 4-bit layer's output."""

    def __init__(
        self,
        shape: tuple[int, int],
        bias: nn.Parameter | None,
        settings: Quantization,
        compute: torch.dtype,
        *,
        cuda: bool,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = self.shape = shape
        self.compute, self.cuda_kernels, self.adapted = compute, cuda, False
        match settings:
            case FourBit(double_quant=double_quant):
                numel = shape[0] * shape[1]
                packed = torch.empty((ceil(numel / 2), 1), dtype=torch.uint8, device="meta")
                stored = four_bit_bytes(numel, double_quant=double_quant)
            case EightBit():
                packed = torch.empty(shape, dtype=torch.int8, device="meta")
                stored = eight_bit_bytes(*shape)
        weight: Any = nn.Parameter(packed, requires_grad=False)
        weight.whole_shape, weight.stored_bytes, weight.quantised_as = shape, stored, settings.type
        self.weight = weight
        self.register_parameter("bias", bias)
        self.four_bit = settings.type != "int8"

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """PEFT asks a module that has this for its weight by `dequantize`, as DoRA does."""
        return self.weight

    def dequantize(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.compute, device=self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        found = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        dtype = self.compute if self.four_bit else found
        bias = cast(Tensor | None, self.bias)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            if not self.four_bit:
                return _EightBitProduct.apply(input.to(dtype), self.shape, bias, self.cuda_kernels)  # type: ignore[no-any-return]
            out: Any = _FourBitProduct.apply(input.to(dtype), self.shape, bias)
        out = out.to(found)
        return out.clone() if self.adapted else out


def compute_dtype(settings: Quantization, precision: str) -> torch.dtype:
    """Of the products; `precision` is fp32, bf16 or fp16."""
    asked = settings.compute_dtype if isinstance(settings, FourBit) else "auto"
    return _DTYPES[precision if asked == "auto" else asked]


def quantise(model: Any, settings: Quantization, precision: str, *, cuda: bool) -> None:
    """The linear layers (and GPT-2's Conv1D) of the backbone become quantised ones, in place, but for `skip_modules`
    and those whose weight is shared, or in 4 bits those whose rows are no whole blocks, as tunesmith.quantization has
    it."""
    from transformers.pytorch_utils import Conv1D

    compute = compute_dtype(settings, precision)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    output, tied = model.get_output_embeddings(), model.all_tied_weights_keys
    shared = {name.removesuffix(".weight") for pair in tied.items() for name in pair}
    for name, layer in list(model.named_modules()):
        transposed = isinstance(layer, Conv1D)
        if not (type(layer) is nn.Linear or transposed) or not name.startswith(prefix):
            continue
        if layer is output or name in shared:
            continue
        if any(f".{name}".endswith(f".{end}") for end in settings.skip_modules):
            continue
        rows, columns = layer.weight.shape
        shape = (columns, rows) if transposed else (rows, columns)
        if isinstance(settings, FourBit) and shape[1] % _BLOCK:
            continue
        made = QuantisedLinear(shape, layer.bias, settings, compute, cuda=cuda)
        model.set_submodule(name, made)


def mark_adapted(model: nn.Module) -> None:
    """Tells quantised layers that they are an adapter's base."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, QuantisedLinear):
            base.adapted = True
