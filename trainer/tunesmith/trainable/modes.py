"""Which parts of a model compute as in training, and which as in evaluation, while parts of it are frozen."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from tunesmith.trainable.structure import Structure

_CALMED = "_tunesmith_calmed"


def settle_modes(model: nn.Module) -> None:
    """To be called after `model.train(mode)`. In training mode, a unit (the embeddings, each layer, what follows the
    layers, the head) none of whose parameters, adapters included, requires a gradient computes as in evaluation:
    without dropout, with the statistics it has. A BatchNorm with frozen parameters keeps its statistics in any unit.
    Where every parameter requires a gradient nothing changes."""
    _stay_calm(model, on=False)
    if not model.training or all(parameter.requires_grad for parameter in model.parameters()):
        return
    structure = Structure(model)
    units: dict[str, list[nn.Module]] = {}
    for name, module in structure.modules.items():
        if name == "" or structure.holds_layers(name):
            module.training = any(parameter.requires_grad for parameter in module.parameters())
        else:
            units.setdefault(structure.unit(name), []).append(module)
    for members in units.values():
        if not any(_trained(module) for module in members):
            for module in members:
                module.training = False
    for module in structure.modules.values():
        if isinstance(module, _BatchNorm) and module.affine and not _trained(module):
            module.training = False
    _stay_calm(model, on=True)


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _stay_calm(model: nn.Module, *, on: bool) -> None:
    """transformers recomputes activations in layers in training mode only, but gradients pass through a frozen layer
    above trained parameters too: such a layer is in training mode when it is called, and in evaluation mode inside."""
    for module in model.modules():
        if not getattr(module, "gradient_checkpointing", False):
            continue
        if on and not module.training:
            if not hasattr(module, _CALMED):
                module.register_forward_pre_hook(_enter)
                module.register_forward_hook(_leave, always_call=True)
            setattr(module, _CALMED, True)
            module.training = True
        elif not on and hasattr(module, _CALMED):
            setattr(module, _CALMED, False)


def _enter(module: nn.Module, args: Any) -> None:
    if cast(Any, module)._tunesmith_calmed:
        module.training = False


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if cast(Any, module)._tunesmith_calmed:
        module.training = True
