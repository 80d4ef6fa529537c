"""Which path computes the step on a device, and why."""

from __future__ import annotations

import importlib
from typing import Literal, cast, get_args

import torch

from tunesmith_kernels import native, triton_support
from tunesmith_kernels.adamw.tensors import Path

Backend = Literal["reference", "cpu", "triton"]


def path_for(device: torch.device | str) -> tuple[Backend, str]:
    """The path that is taken on `device` where none is asked for, and the reason in one line. Builds the native
    library if it is the CPU's and not built yet."""
    kind = torch.device(device).type
    match kind:
        case "cpu":
            reason = native.unavailable()
            if reason is None:
                return "cpu", "C++, one pass over all tensors"
            return "reference", f"plain torch: {reason}"
        case "cuda":
            reason = triton_support.why_not(torch.device(device))
            if reason is None:
                return "triton", "Triton, multi-tensor"
            return "reference", f"plain torch: {reason}"
        case _:
            return "reference", f"plain torch: there is no kernel for {kind}"


def path(backend: Backend | None, device: torch.device) -> Path:
    """The path `backend`, or that of `path_for`. Raises RuntimeError where `backend` cannot run on `device`."""
    name = backend or path_for(device)[0]
    if backend and (fault := _fault(backend, device)):
        raise RuntimeError(f"AdamW(backend={backend!r}): {fault}")
    module = {"reference": "reference", "cpu": "cpu", "triton": "triton_step"}[name]
    return cast(Path, importlib.import_module(f"tunesmith_kernels.adamw.{module}"))


def check_backend(backend: str | None) -> None:
    """Raises ValueError for a name that is none."""
    if backend is not None and backend not in get_args(Backend):
        raise ValueError(f"backend must be None or one of {', '.join(get_args(Backend))}, not {backend!r}")


def _fault(backend: Backend, device: torch.device) -> str | None:
    match backend:
        case "reference":
            return None
        case "cpu":
            return f"the tensors are on {device}" if device.type != "cpu" else native.unavailable()
        case "triton":
            return triton_support.why_not(device)
