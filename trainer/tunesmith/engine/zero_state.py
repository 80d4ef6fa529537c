"""The state of a model that ZeRO-3 has partitioned, to and from the pieces of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.checkpoint.pieces import Piece, Saved, State


def pieces(model: nn.Module, rank: int, kept: Callable[[str], bool]) -> State:
    """What this rank saves of the entries of the model that are `kept`: its runs of elements, and on rank 0 the
    buffers."""
    state: State = dict(model.named_buffers()) if rank == 0 else {}
    persistent = set(filter(kept, model.state_dict()))
    state = {name: value for name, value in state.items() if name in persistent}
    for name, parameter in model.named_parameters():
        if not kept(name):
            continue
        own = cast(Any, parameter)
        size = own.ds_tensor.ds_numel
        start, count = rank * size, min(size, own.ds_numel - rank * size)
        if count > 0:
            data = own.ds_tensor.detach()[:count].float().cpu()
            state[name] = Piece(data, tuple(own.ds_shape), start)
    return state


@torch.no_grad()
def load(model: nn.Module, saved: Saved, rank: int, kept: Callable[[str], bool]) -> None:
    """Into the partitions. Called by all ranks."""
    import deepspeed

    for name, parameter in [(name, p) for name, p in model.named_parameters() if kept(name)]:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if rank == 0:
                parameter.data.copy_(saved.whole(name))
    for name, buffer in model.named_buffers():
        if name in saved.names():
            buffer.copy_(saved.whole(name))


@torch.no_grad()
def gather(model: nn.Module, rank: int, kept: Callable[[str], bool]) -> dict[str, Tensor]:
    """The whole state that is kept, on the CPU of rank 0. Called by all ranks."""
    import deepspeed

    whole: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}  # tied weights stay one tensor
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not kept(name):
            continue
        if id(parameter) not in gathered:
            with deepspeed.zero.GatheredParameters([parameter]):
                gathered[id(parameter)] = parameter.detach().cpu().clone() if rank == 0 else torch.empty(0)
        if rank == 0:
            whole[name] = gathered[id(parameter)]
    if rank == 0:
        persistent = set(filter(kept, model.state_dict()))
        whole |= {name: b.cpu() for name, b in model.named_buffers() if name in persistent}
    return whole
