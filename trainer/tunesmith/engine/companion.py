"""A frozen module beside the one that is trained: a teacher, a reference. It is no child of it, so that no engine
casts, partitions, checkpoints or exports it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from tunesmith.engine.base import Engine
from tunesmith.engine.fsdp2 import FSDP2Engine
from tunesmith.engine.layers import transformer_layers
from tunesmith.errors import UserError
from tunesmith.unpartitioned import unpartitioned


@dataclass(frozen=True, slots=True)
class CompanionSource:
    """`whole` builds the module with its weights on the CPU; `empty` on the meta device, in the dtype that it is to
    have, with what then fills its shards."""

    whole: Callable[[], nn.Module]
    empty: Callable[[], tuple[nn.Module, Callable[[torch.device], Any]]]


def companion(engine: Engine, source: CompanionSource, *, sharded: bool) -> nn.Module:
    """The module on the engine's device, frozen and in evaluation mode. To be called by all ranks when the engine has
    prepared what it trains. `sharded`: a layer is whole only while it computes; its embeddings and its head stay whole
    from the first forward on, since losses may read them. Raises UserError for an engine that cannot."""
    if not sharded:
        with unpartitioned():
            module = source.whole()
        return module.requires_grad_(False).eval().to(engine.device)
    if not isinstance(engine, FSDP2Engine):
        raise UserError(f"placement: sharded is for fsdp2, not for {engine.name}: write replicated")
    module, fill = source.empty()
    module.requires_grad_(False).eval()
    for layer in transformer_layers(module):
        fully_shard(layer, mesh=engine.mesh)
    fully_shard(module, mesh=engine.mesh, reshard_after_forward=False)
    fill(engine.device)
    module.to(engine.device)
    module.eval()
    assert isinstance(module, FSDPModule)
    for name, parameter in module.named_parameters():
        assert not cast(Any, parameter).to_local().is_meta, f"{name} has no weights"
    return module
