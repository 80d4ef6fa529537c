"""LoftQ (Li et al. 2023): B·A begins as the best approximation of what quantisation took from the weights.

One step of the paper's alternation, for the base is quantised already. PEFT's own needs a GPU, and leaves out the scale
with which LoRA multiplies B·A."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.quantized import is_quantized_parameter
from tunesmith.unpartitioned import unpartitioned


@torch.no_grad()
def make_up(peft: Any, adapter: str) -> None:
    """Replaces A and B of every quantised layer: s·B·A = the first r singular values of W − Q(W). Reads the base's
    files once more, in fp32. Raises OSError where they are not there."""
    base = peft.get_base_model()
    with unpartitioned():
        original = type(base).from_pretrained(base.name_or_path, dtype=torch.float32)
    weights: dict[str, Tensor] = dict(original.named_parameters())
    for name, layer in base.named_modules():
        if adapter not in getattr(layer, "lora_A", ()) or not is_quantized_parameter(layer.base_layer.weight):
            continue
        u, s, v = torch.linalg.svd(lost(layer, weights[f"{name}.weight"]), full_matrices=False)
        r = layer.r[adapter]
        root = (s[:r] / layer.scaling[adapter]).sqrt()
        layer.lora_A[adapter].weight.copy_(root[:, None] * v[:r])
        layer.lora_B[adapter].weight.copy_(u[:, :r] * root)


def lost(layer: Any, weight: Tensor) -> Tensor:
    """W − Q(W): fp32 [out, in]. A Conv1D's W lies the other way round in its file."""
    from peft.utils.integrations import dequantize_module_weight

    held = dequantize_module_weight(layer.base_layer).float()
    if (
        getattr(layer.base_layer, "source_cls", None) is not None
        and "Conv1D" in layer.base_layer.source_cls.__name__
    ):
        weight = weight.T
    return weight.to(held.device) - held
