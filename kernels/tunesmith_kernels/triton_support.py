"""What every Triton path shares on the host: whether it can run here, and the launch of a kernel.

This module imports without triton, so that every op can ask `why_not` before it imports its kernels (modules named
`triton_*`, which need triton at import). What kernels share on the device is in `triton_numbers`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

_LEAST_CAPABILITY = (8, 0)  # bfloat16, and the oldest that the kernels are compiled for in the tests


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether triton's kernels run in its interpreter, on CPU tensors. Triton reads the variable when a kernel is
    defined, so it must be set before the first import of triton."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device) -> str | None:
    """Why Triton kernels can't take tensors on `device`, in one clause without a full stop; None where they can."""
    if not _installed():
        return "triton is not installed (pip install 'tunesmith[triton]')"
    if device.type == "cpu":
        return None if interpreting() else "the tensors are on the CPU, and Triton kernels need a CUDA device"
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, not {device.type}"
    if interpreting():
        return "TRITON_INTERPRET=1 is set, and the interpreter takes CPU tensors alone"
    if torch.version.hip is not None:
        return "the Triton kernels are tested on NVIDIA GPUs alone, not on ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _LEAST_CAPABILITY:
        return f"the Triton kernels need compute capability 8.0 or newer, and this GPU has {major}.{minor}"
    return None


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **options: Any) -> None:
    """Starts `programs` programs of a `@triton.jit` kernel on `device`, on its current stream, and returns at once.

    Every launch of this package goes through here, looked up as `triton_support.launch`: a test counts launches by
    replacing it. arguments: the kernel's, in order; options: its constexpr arguments, num_warps and num_stages.
    """
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        kernel[(programs,)](*arguments, **options)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy of `values`, a tensor on the CPU, on `device`, without waiting for it.

    The copy to a GPU is made from a page-locked tensor of its own, which torch's allocator gives out again only
    once the copy is done: so the numbers of the next step can't overtake those of this one.
    """
    if device.type != "cuda":
        return values.to(device, copy=True)
    return values.pin_memory().to(device, non_blocking=True)


def stream_of(device: torch.device) -> int:
    """What identifies the stream on which `launch` would start a kernel: tables that are kept between launches are
    kept per stream."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def signed32(number: int) -> int:
    """The low 32 bits of `number` as a signed integer: what a kernel's i32 argument holds. The argument is to be
    named in `do_not_specialize`, else triton compiles once more for 1 and for multiples of 16."""
    low = number & 0xFFFFFFFF
    return low - (1 << 32) if low >= 1 << 31 else low
