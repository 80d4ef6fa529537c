"""A model that was built whole, with parts that no file has (adapters, a head of its own), given to an engine that
shards: rank 0's weights are dealt out, the other ranks' are dropped before anything is sharded."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunesmith.weights import box_of


def take_weights(module: nn.Module) -> dict[str, Tensor]:
    """Leaves the module on the meta device, its tied parameters tied and its buffers where they are. Returns its
    weights by name on rank 0, nothing elsewhere."""
    taken = {name: p.detach() for name, p in module.named_parameters()} if dist.get_rank() == 0 else {}
    # the old ones stay until all are replaced, lest a new one gets an old one's id
    replaced: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in replaced:
                empty = torch.empty_like(parameter, device="meta")
                replaced[id(parameter)] = (
                    parameter,
                    nn.Parameter(empty, requires_grad=parameter.requires_grad),
                )
            setattr(owner, name, replaced[id(parameter)][1])
    return taken


@torch.no_grad()
def deal_weights(
    module: nn.Module, taken: dict[str, Tensor], device: torch.device, wire: torch.device
) -> None:
    """Gives the sharded module memory on `device`, and each rank its slices of rank 0's `taken` weights, which are
    broadcast one by one through `wire`, and given up on the way. Called by all ranks."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    module.to_empty(device=device)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, buffer)
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is not sharded"
        if dist.get_rank() == 0:
            whole = taken.pop(name).to(wire).contiguous()
        else:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=wire)
        dist.broadcast(whole, src=0)
        local = parameter.to_local()
        local.copy_(whole[box_of(parameter)].to(local.device))
