"""The precision that a recipe asks for, on the device that is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tunesmith.errors import MachineError
from tunesmith.module import Precision

_UPDATES = {
    "bf16_master": "an fp32 copy",
    "bf16_stochastic": "stochastic rounding",
    "bf16_kahan": "what rounding left out (Kahan)",
}


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively (elsewhere it is emulated, and slower than fp32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        cpu: Any = torch.cpu  # torch has no public name for what the CPU computes natively
        return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
    return False


def choose(asked: str, device: torch.device) -> tuple[Precision, str]:
    """(precision, why). Raises MachineError where the device cannot do what was asked."""
    match asked:
        case "auto":
            if native_bf16(device):
                return (
                    "bf16",
                    f"auto: this {device.type} multiplies bf16 natively; weights and optimizer stay fp32",
                )
            return "fp32", f"auto: this {device.type} has no native bf16"
        case "bf16":
            if device.type == "cuda" and not native_bf16(device):
                raise MachineError("training.precision: this GPU has no bf16: use fp16 or fp32")
            slow = "" if native_bf16(device) else " (emulated on this device: slower than fp32)"
            return "bf16", f"asked for; weights and optimizer stay fp32{slow}"
        case "bf16_master" | "bf16_stochastic" | "bf16_kahan":
            if device.type == "cuda" and not native_bf16(device):
                raise MachineError(f"training.precision: this GPU has no bf16, which {asked} is about")
            return "bf16", f"asked for; weights are bf16 too, updated by way of {_UPDATES[asked]}"
        case "fp16":
            return "fp16", "asked for; weights and optimizer stay fp32, dynamic loss scale"
        case _:
            return "fp32", "asked for, or the default"


def round_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives the parameters a dtype, in place; ties stay. Buffers stay as they are: rotary frequencies in bf16 would
    move far positions."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
