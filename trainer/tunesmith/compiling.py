"""torch.compile, layer by layer: one graph per kind of layer, whole or not at all."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from tunesmith.engine.layers import transformer_layers
from tunesmith.errors import UserError


def compile_layers(model: nn.Module) -> int:
    """Compiles the forward of every transformer layer, in place; how many there are. A layer that does not become
    one graph fails at its first call (`explain_break`): pieces of graphs would be slower than none, in silence.

    The forward, not the module: what engines hang on a module (gathering its weights) stays outside the graph.
    Called before the engine wraps the model."""
    layers = transformer_layers(model)
    if not layers:
        raise UserError(f"training.torch_compile: {type(model).__name__} has no stack of layers to compile")
    for layer in layers:
        cast(Any, layer).forward = torch.compile(layer.forward, fullgraph=True)
    return len(layers)


def explain_break(error: BaseException) -> str | None:
    """What to tell the user where `error` says that a layer could not be compiled whole."""
    kind = type(error)
    if not kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"training.torch_compile: a layer does not compile as one graph ({' '.join(lines[:3])[:300]}): set false"
