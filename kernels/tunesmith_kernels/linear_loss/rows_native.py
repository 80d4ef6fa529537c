"""The row kernel of the linear cross-entropy in C++ (native/ce_rows.cpp), on the CPU, for fp32 and bf16 logits."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from tunesmith_kernels import native
from tunesmith_kernels.linear_loss.rows import OUTPUTS, RowInputs, RowOptions, RowOutputs


def native_rows(logits: Tensor, inputs: RowInputs, options: RowOptions, outputs: RowOutputs) -> None:
    """See `RowKernel`; logits fp32 or bf16 on the CPU. Raises `native.Unavailable` where there is no library."""
    assert logits.is_contiguous()
    assert logits.dtype in (torch.float32, torch.bfloat16)
    soft = inputs.target.is_floating_point()
    native.library().tunesmith_ce_rows(
        c_int(logits.dtype == torch.bfloat16),
        c_void_p(logits.data_ptr()),
        c_int64(logits.shape[0]),
        c_int64(logits.shape[1]),
        pointer(None if soft else inputs.target),
        pointer(inputs.target if soft else None),
        pointer(inputs.class_weight),
        pointer(inputs.token_weight),
        pointer(inputs.gradient_factor),
        c_float(options.label_smoothing),
        c_float(options.z_loss),
        c_float(options.focal_gamma),
        c_float(options.softcap),
        c_float(options.scale),
        *(pointer(getattr(outputs, name)) for name in OUTPUTS),
    )


def pointer(tensor: Tensor | None) -> c_void_p:
    """The address of a contiguous tensor's numbers; null for None."""
    if tensor is None:
        return c_void_p(None)
    assert tensor.is_contiguous()
    return c_void_p(tensor.data_ptr())
