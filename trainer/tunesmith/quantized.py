"""Quantised weights, once they are there: what they are made of, and what they weigh."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PARAMETERS = {"Params4bit", "Int8Params"}


def linear_layers(model: nn.Module) -> set[str]:
    """The names of the plain linear layers, GPT-2's Conv1D among them: what can be quantised."""
    from transformers.pytorch_utils import Conv1D

    return {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    }


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and is_quantized_parameter(weight):
            yield name, module


def is_quantized_parameter(parameter: Tensor) -> bool:
    return type(parameter).__name__ in _PARAMETERS


def is_quantized(model: nn.Module) -> bool:
    return any(is_quantized_parameter(p) for p in model.parameters())


def elements(parameter: nn.Parameter) -> int:
    """How many weights it holds, which for 4 bits is twice the length of its bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _parts(parameter: nn.Parameter) -> list[Tensor]:
    """The packed weights, and all that is needed to unpack them."""
    own = cast(Any, parameter)
    match type(parameter).__name__:
        case "Params4bit":
            state = own.quant_state
            nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            return [parameter.data, state.absmax, state.code, *nested]
        case "Int8Params":
            return [parameter.data, own.SCB]
        case _:
            return [parameter.data]


def stored_bytes(parameter: nn.Parameter) -> int:
    """The memory it takes: with the scales and tables of a quantised weight, as it is for any other."""
    return sum(part.numel() * part.element_size() for part in _parts(parameter))


def scales(model: nn.Module) -> frozenset[str]:
    """The entries of the state dict that are neither parameters nor buffers but belong to a quantised weight."""
    prefixes = [f"{name}." if name else "" for name, _ in quantized_layers(model)]
    return frozenset(
        f"{prefix}{leaf}"
        for prefix in prefixes
        for leaf in model.get_submodule(prefix[:-1]).state_dict()
        if leaf not in {"weight", "bias"}
    )


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the quantised weights and their scales, in the order of the modules (whose names adapters change): 64
    hexadecimal digits."""
    digest = hashlib.sha256()
    for _, module in quantized_layers(model):
        for part in _parts(module.weight):
            digest.update(part.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def facts(model: nn.Module) -> dict[str, Any]:
    """`{"quantization": …}` for the start-up report, read from the layers; empty where none is quantised."""
    quantized = dict(quantized_layers(model))
    if not quantized:
        return {}
    weights = [module.weight for module in quantized.values()]
    first = weights[0]
    about: dict[str, Any] = {"type": "int8"}
    if type(first).__name__ == "Params4bit":
        names = {dtype: name for name, dtype in DTYPES.items()}
        compute = next(iter(quantized.values())).compute_dtype
        about = {
            "type": first.quant_type,
            "double_quant": first.compress_statistics,
            "compute_dtype": names[compute],
        }
    return {
        "quantization": about
        | {
            "modules": len(quantized),
            "kept": sorted(linear_layers(model)),
            "parameters": sum(elements(weight) for weight in weights),
            "of_parameters": sum(elements(p) for p in model.parameters()),
            "bytes": sum(stored_bytes(weight) for weight in weights),
            "sha256": fingerprint(model),
        }
    }


def refuse_trained(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raises UserError where a parameter that is to be trained is quantised."""
    for name, parameter in named:
        if is_quantized_parameter(parameter):
            raise UserError(
                f"trainable: {name} is quantised and cannot be trained: leave it frozen (unfreeze head, norms or "
                "biases), or use adapters"
            )
