"""Which path computes the step on a device: that of `adamw.paths`, for the same reasons."""

from __future__ import annotations

import importlib
from typing import cast

import torch

from tunesmith_kernels.adamw import paths
from tunesmith_kernels.adamw.paths import Backend
from tunesmith_kernels.adamw8bit.tensors import Path


def path(backend: Backend | None, device: torch.device) -> Path:
    """The path `backend`, or that of `adamw.path_for`. Raises RuntimeError where `backend` cannot run on `device`."""
    paths.path(backend, device)  # the same checks
    name = backend or paths.path_for(device)[0]
    module = {"reference": "reference", "cpu": "cpu", "triton": "triton_step"}[name]
    return cast(Path, importlib.import_module(f"tunesmith_kernels.adamw8bit.{module}"))
