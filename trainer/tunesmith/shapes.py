"""The shape that a parameter has as a whole."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Under ZeRO-3 a parameter is an empty placeholder that carries its shape along; a DTensor's is the whole one."""
    return cast(torch.Size, getattr(parameter, "ds_shape", parameter.shape))


def whole_numel(parameter: nn.Parameter) -> int:
    """Elements, however few bits hold one: bitsandbytes puts two of four bits in a byte, beside the whole's shape."""
    state = getattr(parameter, "quant_state", None)
    return whole_shape(parameter).numel() if state is None else torch.Size(state.shape).numel()
