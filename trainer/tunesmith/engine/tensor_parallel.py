"""Tensor parallelism (Shoeybi et al. 2019) by the plan that comes with a model in transformers: each rank of a group
computes a part of every layer's heads and hidden units."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from tunesmith.errors import UserError


def split_layers(model: Any, mesh: DeviceMesh) -> int:
    """Shards the parameters of a model on the meta device over `mesh` (1-D) and makes its modules' forwards exchange
    what they must; the number of parameters that are split. Raises UserError where the model has no plan, or one
    that these sizes do not fit."""
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    size = mesh.size()
    config = model.config.get_text_config()
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, field, None)
        if isinstance(heads, int) and heads % size:
            raise UserError(
                f"parallel.tensor_parallel_size: {size} does not divide the model's {heads} {field}"
            )
    try:
        plan, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_size=size))
    except ValueError:
        plan = {}
    if not plan:
        raise UserError(
            f"parallel.tensor_parallel_size: transformers has no tensor-parallel plan for {type(model).__name__}: "
            "leave it at 1"
        )
    apply_tensor_parallelism(model, mesh, plan)
    return sum(name in plan for name, _ in model.named_parameters())
