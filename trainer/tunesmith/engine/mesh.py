"""The grid of ranks that fully_shard and tensor parallelism work on."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tunesmith.errors import UserError
from tunesmith.recipe.parallel import FSDP2


def shard_mesh(device_type: str, world_size: int, settings: FSDP2) -> tuple[DeviceMesh, DeviceMesh | None]:
    """(the mesh of the shards: 1-D, or copies × shards; that of tensor parallelism, if there is one). Raises
    UserError where the number of processes does not divide so."""
    tensor_size = settings.tensor_parallel_size
    shard_size = settings.shard_size or max(1, world_size // tensor_size)
    if world_size % (shard_size * tensor_size):
        raise UserError(
            f"parallel: shard_size {shard_size} × tensor_parallel_size {tensor_size} does not divide the "
            f"{world_size} processes"
        )
    copies = world_size // (shard_size * tensor_size)
    # the ranks of one layer are neighbours: they talk most
    mesh = init_device_mesh(
        device_type, (copies, shard_size, tensor_size), mesh_dim_names=("copy", "shard", "tensor")
    )
    shards = mesh["shard"] if copies == 1 else mesh["copy", "shard"]
    return shards, mesh["tensor"] if tensor_size > 1 else None
