"""`parallel`: how the run is spread over processes. The number of processes is an option of the launch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.recipe.base import Positive, PositiveFloat, Section


class _Strategy(Section):
    """`timeout` (seconds) bounds a collective: past it the job ends instead of hanging."""

    timeout: PositiveFloat = 600.0


class Auto(_Strategy):
    """The engine is chosen by model size, memory and number of processes; the start-up report says why."""

    strategy: Literal["auto"] = "auto"


class Single(_Strategy):
    """One process."""

    strategy: Literal["single"]


class DDP(_Strategy):
    """A whole copy of model and optimizer on every rank."""

    strategy: Literal["ddp"]


class Zero1(_Strategy):
    """DeepSpeed: the optimizer's state is sharded; `offload_optimizer` keeps it, and its step, on the CPU."""

    strategy: Literal["zero1"]
    offload_optimizer: bool = False


class Zero2(_Strategy):
    """DeepSpeed: gradients too are sharded."""

    strategy: Literal["zero2"]
    offload_optimizer: bool = False


class Zero3(_Strategy):
    """DeepSpeed: parameters too are sharded; `offload_parameters` keeps the shards in the CPU's memory."""

    strategy: Literal["zero3"]
    offload_optimizer: bool = False
    offload_parameters: bool = False


class FSDP2(_Strategy):
    """torch's fully_shard: parameters, gradients and optimizer state are sharded over `shard_size` ranks (all of
    them, where null; fewer: hybrid, with copies between the groups). `tensor_parallel_size` ranks compute one
    layer together, `sequence_parallel_size` ranks one sequence. `offload` keeps the shards, and the optimizer's
    step, on the CPU."""

    strategy: Literal["fsdp2"]
    shard_size: Positive | None = None
    tensor_parallel_size: Positive = 1
    sequence_parallel_size: Positive = 1
    offload: bool = False


Parallel = Annotated[
    Auto | Single | DDP | Zero1 | Zero2 | Zero3 | FSDP2,
    Field(discriminator="strategy"),
]
