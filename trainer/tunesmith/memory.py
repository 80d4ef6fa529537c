"""Memory: what was used, and what is there."""

from __future__ import annotations

import resource
import sys

import psutil
import torch


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process held: allocator bytes on an accelerator, resident set size on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory_bytes(device: torch.device) -> int:
    """What the device (on the CPU: the machine) has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
