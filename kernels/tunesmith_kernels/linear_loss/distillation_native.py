"""The row kernel of the linear distillation in C++ (native/distillation_rows.cpp), on the CPU, for fp32 and bf16."""

from __future__ import annotations

from ctypes import c_double, c_float, c_int, c_int64

import torch
from torch import Tensor

from tunesmith_kernels import native
from tunesmith_kernels.linear_loss.distillation_rows import (
    DISTILLATION_OUTPUTS,
    TAIL_FLOOR,
    DistillationInputs,
    DistillationOptions,
    DistillationOutputs,
)
from tunesmith_kernels.linear_loss.rows_native import pointer

_DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


def native_distillation_rows(
    logits: Tensor, inputs: DistillationInputs, options: DistillationOptions, outputs: DistillationOutputs
) -> None:
    """See `DistillationKernel`; logits fp32 or bf16 on the CPU. Raises `native.Unavailable` where there is no
    library."""
    assert logits.is_contiguous()
    assert logits.dtype in (torch.float32, torch.bfloat16)
    teacher = inputs.teacher_logits
    if teacher is not None and teacher.dtype not in (torch.float32, torch.bfloat16):
        teacher = teacher.float()
    native.library().tunesmith_distillation_rows(
        c_int(logits.dtype == torch.bfloat16),
        pointer(logits),
        c_int64(logits.shape[0]),
        c_int64(logits.shape[1]),
        c_int(teacher is not None and teacher.dtype == torch.bfloat16),
        pointer(teacher),
        pointer(inputs.indices),
        pointer(inputs.log_probs),
        c_int64(0 if inputs.indices is None else inputs.indices.shape[1]),
        pointer(inputs.target),
        pointer(inputs.token_weight),
        pointer(inputs.gradient_factor),
        c_int(_DIVERGENCES[options.divergence]),
        c_double(options.beta),
        *(
            c_float(getattr(options, name))
            for name in ("temperature", "kd_weight", "ce_weight", "softcap", "scale")
        ),
        c_float(options.teacher_softcap),
        c_float(options.teacher_scale),
        c_int(options.tail),
        c_double(TAIL_FLOOR),
        *(pointer(getattr(outputs, name)) for name in DISTILLATION_OUTPUTS),
    )
