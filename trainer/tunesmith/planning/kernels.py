"""The kernels of the device that is planned for, where they keep other tensors than this machine's would."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    yield
