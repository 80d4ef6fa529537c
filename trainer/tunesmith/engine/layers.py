"""The layers of a model: what is gathered, computed and let go of as one."""

from __future__ import annotations

from torch import nn


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The model's blocks, outermost only: transformers marks them as what activation checkpointing recomputes.
    Where a model has none of these, the elements of its longest ModuleLists."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, GradientCheckpointingLayer):
                found.append(child)
            else:
                visit(child)

    visit(model)
    if not found:
        stacks = [
            module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1
        ]
        longest = max((len(stack) for stack in stacks), default=0)
        found = [layer for stack in stacks if len(stack) == longest for layer in stack]
    return found
