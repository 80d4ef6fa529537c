"""Which parts of a model compute as in training, and which as in evaluation, while parts of it are frozen."""

from __future__ import annotations

from collections.abc import Callable
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
    above trained parameters too: such a layer is in training mode where that is asked, in evaluation mode inside."""
    for module in model.modules():
        if not hasattr(module, "_gradient_checkpointing_func"):
            continue
        layer = cast(Any, module)
        calm = on and layer.gradient_checkpointing and not layer.training
        if calm and not hasattr(layer, _CALMED):
            layer._gradient_checkpointing_func = _calmly(layer, layer._gradient_checkpointing_func)
        if calm or hasattr(layer, _CALMED):
            setattr(layer, _CALMED, calm)
        layer.training |= calm


def _calmly(layer: Any, recomputed: Callable[..., Any]) -> Callable[..., Any]:
    def call(function: Callable[..., Any], *args: Any) -> Any:
        def inside(*args: Any) -> Any:
            training = layer.training
            layer.training = training and not getattr(layer, _CALMED)
            try:
                return function(*args)
            finally:
                layer.training = training

        return recomputed(inside, *args)

    return call
