"""Which path each op takes on this machine, and why. `python -m tunesmith_kernels` prints it."""

from __future__ import annotations

import torch

from tunesmith_kernels.adamw import path_for as adamw_path
from tunesmith_kernels.linear_loss.backends import path_for as loss_path


def explain(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16
) -> dict[str, tuple[str, str]]:
    """{op: (path, why)} for tensors of `dtype` on `device` (by default the GPU where there is one, else the CPU):
    what is taken where no backend is asked for. On the CPU it builds the native library, if that is not done."""
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or "cpu"
    device = torch.device(device)
    loss, step = loss_path(device, dtype), adamw_path(device)
    return {"linear_cross_entropy": loss, "linear_distillation": loss, "AdamW": step, "AdamW8bit": step}
