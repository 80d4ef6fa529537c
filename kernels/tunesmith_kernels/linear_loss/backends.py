"""Which way a linear loss is computed here, and why."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from tunesmith_kernels import native
from tunesmith_kernels.linear_loss.rows import RowKernel, torch_rows

Backend = Literal["reference", "torch", "cpu", "triton"]


def choose(hidden: Tensor, asked: str | None) -> Backend:
    """`asked`, if it can run on hidden's device and dtype, or the fastest that can. Raises ValueError."""
    if asked is None:
        return path_for(hidden.device, hidden.dtype)[0]
    for name in get_args(Backend):
        if name == asked:
            if reason := obstacle(name, hidden.device, hidden.dtype):
                raise ValueError(f"linear loss: backend {asked} cannot run here: {reason}")
            return name
    raise ValueError(f"linear loss: no backend {asked!r}: one of {', '.join(get_args(Backend))}")


def path_for(device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    """The backend that is chosen for hidden states of a device and dtype, and why, in one line."""
    if dtype == torch.float64:
        return "reference", "fp64 has no kernel: the whole logits are computed"
    fast: Backend = "cpu" if device.type == "cpu" else "triton"
    reason = obstacle(fast, device, dtype)
    if reason is None:
        how = "C++ row kernel" if fast == "cpu" else "Triton row kernel"
        return fast, f"{how} on chunks of logits"
    return "torch", f"torch's operators on chunks of logits, slower: {reason}"


def row_kernel(backend: str) -> RowKernel:
    match backend:
        case "torch":
            return torch_rows
        case "cpu":
            from tunesmith_kernels.linear_loss.rows_native import native_rows

            return native_rows
        case "triton":
            from tunesmith_kernels.linear_loss.triton_rows import triton_rows

            return triton_rows
        case _:
            raise AssertionError(backend)


def obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run; None if it can."""
    match backend:
        case "reference":
            return None
        case "torch":
            return "fp64 has the reference only" if dtype == torch.float64 else None
        case "cpu":
            if device.type != "cpu":
                return f"the hidden states are on {device.type}"
            if dtype not in (torch.float32, torch.bfloat16):
                return f"the C++ kernel has fp32 and bf16, not {str(dtype).removeprefix('torch.')}"
            return native.unavailable()
        case "triton":
            if dtype == torch.float64:
                return "fp64 has the reference only"
            from tunesmith_kernels import triton_support

            return triton_support.why_not(device)
        case _:
            raise AssertionError(backend)


# They look for a compiler and load a library: nothing that dynamo could trace. torch.compiler.assume_constant_result
# sets this mark too, but imports all of dynamo, which takes longer than torch itself.
for _function in (path_for, obstacle):
    _function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
