"""Stochastic depth (`model.drop_path`; Huang et al. 2016, "Deep Networks with Stochastic Depth"): while it trains, a
layer is left out for a row with a probability that rises with its depth.

A family that has it in its own layers (`drop_path_rate`: transformers' vision models) is given the rate in its
config. Elsewhere a hook on each transformer layer turns its output h for the input x into x + m·(h − x), with m = 0
with probability p and else 1/(1 − p), for each row of the batch on its own: the expectation is h, and evaluation, with
m = 1, needs no correction. Parameters, their names and the layer's forward (checkpointed, compiled) stay as they are.

LayerDrop (`layerdrop`, `encoder_layerdrop`: Fan et al. 2020) is something else: it leaves a layer out for a whole
batch, another one on each rank, and corrects nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import UserError

_KEY = "model.drop_path"
_FIELD = "drop_path_rate"


def override_drop_path(config: Any, rate: float) -> None:
    """Sets the field that a family may have for it, in text and nested configs."""
    from huggingface_hub.errors import StrictDataclassError

    if isinstance(value := getattr(config, _FIELD, None), list | tuple):
        raise UserError(
            f"{_KEY}: {type(config).__name__} has a rate per stage: set model.config.{_FIELD} like {list(value)}"
        )
    if value is not None:
        try:
            setattr(config, _FIELD, rate)
        except StrictDataclassError:
            raise UserError(
                f"{_KEY}: {type(config).__name__} takes no fraction for it: leave it out"
            ) from None
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            override_drop_path(inner, rate)


def check_drop_path(model: Any, rate: float) -> list[float]:
    """The probabilities of the modules that a family has for it; none where it has no field for the rate. Raises
    UserError where it has the field, and no module took the rate."""
    if not _has_field(model.config):
        return []
    taken = [float(one.drop_prob or 0.0) for one in model.modules() if _is_drop_path(one)]
    if not taken or max(taken) != rate:
        raise UserError(
            f"{_KEY}: {type(model).__name__} does nothing with its config's {_FIELD}: leave it out"
        )
    return taken


def _has_field(config: Any) -> bool:
    inner = [getattr(config, name, None) for name in config.sub_configs]
    return hasattr(config, _FIELD) or any(_has_field(one) for one in inner if one is not None)


def _is_drop_path(module: nn.Module) -> bool:
    return type(module).__name__.endswith("DropPath") and hasattr(module, "drop_prob")


def add_drop_path(model: Any, rate: float) -> list[float]:
    """Hooks every transformer layer; the probabilities, layer by layer. That of layer l of L (of an encoder or a
    decoder, each by itself) is rate·l/L, the paper's linear rule. Drawn from the default generator of the layer's
    device, one number per row. Raises UserError for a model whose layers this would not leave out."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    stacks = [
        [layer for layer in stack if isinstance(layer, GradientCheckpointingLayer)]
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
    ]
    stacks = [stack for stack in stacks if stack]
    name, depth = type(model).__name__, sum(map(len, stacks))
    if depth == 0:
        raise UserError(
            f"{_KEY}: {name} has no stack of layers that transformers marks as such: leave it out"
        )
    if depth < (stated := getattr(model.config.get_text_config(), "num_hidden_layers", None) or 0):
        raise UserError(
            f"{_KEY}: {name} has {depth} layers for a depth of {stated}: a layer used again has no depth"
        )
    rates: list[float] = []
    for stack in stacks:
        for number, layer in enumerate(stack, start=1):
            rates.append(rate * number / len(stack))
            layer.register_forward_hook(_leaving_out(rates[-1]), with_kwargs=True)
    return rates


def _leaving_out(probability: float) -> Callable[..., Any]:
    # a hook: engines' own hooks, registered later, see its result, and gradient checkpointing, which transformers
    # does within the layer's forward, never runs it twice
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not layer.training:
            return None
        before: Any = args[0] if args else kwargs.get("hidden_states")
        after = output[0] if isinstance(output, tuple) else output
        if not (_is_states(before) and _is_states(after) and before.shape == after.shape):
            raise UserError(
                f"{_KEY}: {type(layer).__name__} does not map hidden states [rows, positions, width] to such: "
                "leave it out"
            )
        mixed = leave_out(before, after, probability)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return hook


def _is_states(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3


def leave_out(before: Tensor, after: Tensor, probability: float) -> Tensor:
    """before + m·(after − before), m of each row 0 with `probability` < 1, else 1/(1 − probability): [rows, positions,
    width], in after's dtype."""
    before = before.to(after.dtype)
    kept = torch.rand(len(before), 1, 1, device=before.device) >= probability
    return torch.where(kept, torch.lerp(before, after, 1.0 / (1.0 - probability)), before)
