"""The tensors of this process, in memory order: what a kernel may walk over."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The local part of a DTensor; any other tensor as it is."""
    return cast(Any, tensor).to_local() if is_dtensor(tensor) else tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Without an import of torch.distributed.tensor: whoever made one has done that."""
    return hasattr(tensor, "to_local")


def in_memory_order(param: Tensor, grad: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Contiguous views of the parameter and its state, and of its gradient or of a copy that is laid out alike.

    Raises ValueError where the parameter's memory has gaps or overlaps, RuntimeError where a state is laid out
    otherwise.
    """
    if torch.empty_like(param, device="meta").stride() != param.stride():
        raise ValueError(
            f"a parameter of strides {param.stride()} is not dense: AdamW needs one without gaps"
        )
    if grad.stride() != param.stride():
        grad = torch.empty_like(param).copy_(grad)
    if any(state.shape != param.shape or state.stride() != param.stride() for state in states):
        raise RuntimeError("AdamW: a state is not laid out in memory like its parameter")
    return _flat(param), _flat(grad), [_flat(state) for state in states]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))


def shard_offset(param: Tensor) -> int:
    """The index of the first local element within the whole parameter: 0 but for a DTensor that is sharded.

    Raises ValueError for placements whose local elements are not one run of the whole (anything but Shard(0) and
    Replicate): stochastic rounding is keyed to the index in the whole.
    """
    if not is_dtensor(param):
        return 0
    dtensor = cast(Any, param)
    for placement in dtensor.placements:
        kind = type(placement).__name__
        if kind != "Replicate" and not (kind == "Shard" and placement.dim == 0):
            raise ValueError(
                f"stochastic rounding of a parameter placed as {placement!r}: only Shard(0) and Replicate keep its "
                "local elements in one run; set_keys can state the offset"
            )
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(dtensor.shape, dtensor.device_mesh, dtensor.placements)
    return offsets[0] * (param.numel() // param.shape[0]) if param.numel() else 0
