"""The state of a model whose parameters are DTensors, to and from the pieces of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunesmith.checkpoint.pieces import Piece, Saved, State
from tunesmith.engine.shards import Shard, flat_start
from tunesmith.weights import place_of


def pieces(model: nn.Module, rank: int, tensor_rank: int, kept: Callable[[str], bool]) -> State:
    """What this rank, the `tensor_rank`-th of those that split its layers, saves of the entries of the model that are
    `kept`: its own slices, and on rank 0 what every rank holds."""
    state: State = {}
    for name, tensor in model.state_dict().items():
        if not kept(name):
            continue
        if not isinstance(tensor, DTensor):
            if rank == 0:
                state[name] = tensor
        elif writes(tensor, tensor_rank):
            state[name] = Piece(tensor.to_local().detach(), tuple(tensor.shape), place_of(tensor)[0])
    return state


def writes(tensor: DTensor, tensor_rank: int) -> bool:
    """Whether this rank is the one of those that hold this slice that saves it."""
    if tensor_rank > 0 and "tensor" not in (tensor.device_mesh.mesh_dim_names or ()):
        return False  # a layer that is not split: all ranks of the group hold it
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    places = zip(coordinate, tensor.placements, strict=True)
    first = all(at == 0 for at, placement in places if placement.is_replicate())
    return first and tensor.to_local().numel() > 0


@torch.no_grad()
def load(model: nn.Module, saved: Saved, kept: Callable[[str], bool]) -> None:
    """Into the model's own memory."""
    for name, tensor in model.state_dict().items():
        if not kept(name):
            continue
        if isinstance(tensor, DTensor):
            tensor.to_local().copy_(saved.box(*place_of(tensor), name))
        else:
            tensor.copy_(saved.whole(name))


@torch.no_grad()
def gather(
    model: nn.Module, device: torch.device, rank: int, kept: Callable[[str], bool]
) -> dict[str, Tensor]:
    """The whole state that is kept, on the CPU of rank 0, one tensor after the other; tied weights stay one tensor."""
    whole: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not kept(name):
            continue
        if id(tensor) not in gathered:
            full = cast(DTensor, tensor.to(device)).full_tensor() if isinstance(tensor, DTensor) else tensor
            gathered[id(tensor)] = full.detach().cpu() if rank == 0 else torch.empty(0)
        if rank == 0:
            whole[name] = gathered[id(tensor)]
    return whole


def optimizer_pieces(
    parameters: Mapping[str, DTensor], states: Mapping[str, Mapping[str, Any]], tensor_rank: int
) -> dict[str, State]:
    """What this rank saves of the optimizer's state: tensors as large as its slice of the parameter are pieces,
    anything else is a value of the whole parameter."""
    found: dict[str, State] = {}
    for name, parameter in parameters.items():
        state, local = states[name], parameter.to_local()
        if state and writes(parameter, tensor_rank):
            start, shape = place_of(parameter)[0], tuple(parameter.shape)
            found[name] = {
                key: Piece(value, shape, start)
                if isinstance(value, Tensor) and value.dim() > 0 and value.shape == local.shape
                else value
                for key, value in state.items()
            }
    return found


def read_optimizer(parameters: Mapping[str, DTensor], saved: Saved) -> dict[str, dict[str, Any]]:
    """This rank's slices of the state, by name and key."""

    def read(name: str, key: str) -> Any:
        if not saved.is_tensor(name, key) or saved.shape(name, key) != tuple(parameters[name].shape):
            return saved.value(name, key)
        return saved.box(*place_of(parameters[name]), name, key)

    return saved.nested(read)


def copies(parameter: DTensor, world_size: int) -> int:
    """How many ranks hold the same slice."""
    slices = 1
    for dim, placement in enumerate(parameter.placements):
        slices *= 1 if placement.is_replicate() else parameter.device_mesh.size(dim)
    return world_size // slices


def shard(name: str, parameter: DTensor, world_size: int, tensor_rank: int) -> Shard:
    """This rank's slice of the parameter, without a gradient."""
    shape, box = tuple(parameter.shape), place_of(parameter)[0]
    first, held = flat_start(box, shape), copies(parameter, world_size)
    value = parameter.to_local().detach()
    return Shard(name, value, None, shape, first, box, held, writes(parameter, tensor_rank))
