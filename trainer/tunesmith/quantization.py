"""A model's linear layers in few bits (`model.quantization`), by bitsandbytes' layers and transformers' loading.

Quantised weights are constants: no step changes them, and the model's files give the same bits again, on every rank,
in every process and with any number of threads. Quantisation is therefore done on the CPU, in one thread (the mean
that double quantisation subtracts depends on the order of its additions)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from copy import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import MissingExtra, UserError
from tunesmith.quantized import (
    DTYPES,
    elements,
    facts,
    fingerprint,
    is_quantized,
    is_quantized_parameter,
    linear_layers,
    quantized_layers,
    refuse_trained,
    scales,
    stored_bytes,
)
from tunesmith.recipe.quantization import FourBit, Quantization

_BLOCK = 64  # weights with one scale, in 4 bits


def require() -> None:
    """Raises MissingExtra where bitsandbytes is not installed."""
    # it warns at import of optional kernels, and at every product of its casts
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise MissingExtra("bitsandbytes", "bitsandbytes", "model.quantization") from None


def load(
    skeleton: Any,
    settings: Quantization,
    compute_dtype: torch.dtype,
    load_with: Callable[..., tuple[Any, dict[str, Any]]],
) -> tuple[Any, dict[str, Any]]:
    """The model with its base quantised, in eval mode, and what loading found out.

    `skeleton` is the model without weights (it may be on the meta device), `load_with(**options)` transformers'
    from_pretrained; `compute_dtype` is what products are computed in where the settings say auto (4 bits only).
    Heads, output embeddings, tied weights, `skip_modules` and layers that the files do not have stay fp32, and of 4
    bits those whose rows are not whole blocks. Raises UserError for a `skip_modules` entry that matches no linear
    layer, and where nothing is left to quantise."""
    linear = linear_layers(skeleton)
    kept = _heads(skeleton, linear) | _skipped(settings.skip_modules, linear)
    if isinstance(settings, FourBit):
        kept |= _broken_rows(skeleton, linear)
        if settings.compute_dtype != "auto":
            compute_dtype = DTYPES[settings.compute_dtype]
    if kept == linear:
        raise UserError(_nothing(skeleton, settings))

    def attempt() -> tuple[Any, dict[str, Any]]:
        with _one_thread():
            return load_with(
                quantization_config=_config(settings, compute_dtype, kept), device_map={"": "cpu"}
            )

    model, found = attempt()
    # transformers leaves a quantised layer that the files do not have unquantised, in a class that cannot compute
    # with it
    missing = {name.removesuffix(".weight") for name in found["missing_keys"]} & linear - kept
    if missing:
        kept |= missing
        del model
        model, found = attempt()
    if not is_quantized(model):
        raise UserError(_nothing(model, settings))
    _take_over(model)
    # what is not quantised lies in the mapped files: while any of it does, all that was read of them stays resident
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_quantized_parameter(tensor):
            tensor.data = tensor.data.clone()
    return model, found


def _heads(model: Any, linear: set[str]) -> set[str]:
    """Those outside the backbone, the output embeddings, and those whose weight another module shares."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    output = model.get_output_embeddings()
    found = {name for name in linear if not name.startswith(prefix)} | (linear & tied)
    return found | {name for name in linear if model.get_submodule(name) is output}


def _skipped(entries: list[str], linear: set[str]) -> set[str]:
    found: set[str] = set()
    for entry in entries:
        matched = {name for name in linear if f".{name}".endswith(f".{entry}")}
        if not matched:
            raise UserError(
                f"model.quantization.skip_modules: {entry!r} matches no linear layer; their names end in "
                + ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            )
        found |= matched
    return found


def _broken_rows(model: nn.Module, linear: set[str]) -> set[str]:
    """Those whose inputs are no multiple of a block: on a CPU bitsandbytes 0.50 takes the next row's scale for the
    rest of a row of 32 or 96 weights, which is off by as much as the weights are."""
    found: set[str] = set()
    for name in linear:
        layer: Any = model.get_submodule(name)
        inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0]
        if inputs % _BLOCK:
            found.add(name)
    return found


def _nothing(model: nn.Module, settings: Quantization) -> str:
    wide = f" whose inputs are a multiple of {_BLOCK}" if isinstance(settings, FourBit) else ""
    return f"model.quantization: {type(model).__name__} has no linear layer{wide} left to quantise"


def _config(settings: Quantization, compute_dtype: torch.dtype, kept: set[str]) -> Any:
    from transformers import BitsAndBytesConfig

    # patterns, lest `score` also keep `relation_score`
    names = [f"^{name.replace('.', '[.]')}$" for name in sorted(kept)]
    if isinstance(settings, FourBit):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.type,
            bnb_4bit_use_double_quant=settings.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=names,
        )
    return BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_threshold=settings.threshold, llm_int8_skip_modules=names
    )


@contextmanager
def _one_thread() -> Generator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def _layers() -> tuple[type[nn.Module], type[nn.Module]]:
    """bitsandbytes' linear layers, whose own forwards round the bias to the dtype of the inputs for good, and in eval
    mode on a CPU compute something else than in training: 4-bit weights are repacked for ever into a form that has no
    gradient (where there is AVX512-BF16), 8-bit products round the inputs too."""
    import bitsandbytes as bnb

    library: Any = bnb

    class Linear4bit(library.nn.Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            # an engine that shards leaves a plain parameter in the weight's place: the module keeps its scales
            state = getattr(self.weight, "quant_state", self.quant_state)
            if state.absmax.device != x.device:
                state.to(x.device)
            dtype = self.compute_dtype
            bias = None if self.bias is None else self.bias.to(dtype)
            found = _autocast_dtype(x)
            with torch.autocast(x.device.type, enabled=False):
                product = library.matmul_4bit(x.to(dtype), self.weight, bias=bias, quant_state=state)
            return product.to(found)

    class Linear8bitLt(library.nn.Linear8bitLt):
        def forward(self, x: Tensor) -> Tensor:
            self.state.SCB = self.state.SCB.to(x.device)
            # one for each forward, lest a weight that was gathered for it outlives its backward
            state = copy(self.state)
            state.CB, state.is_training = self.weight.data, True
            dtype = _autocast_dtype(x)
            bias = None if self.bias is None else self.bias.to(dtype)
            with torch.autocast(x.device.type, enabled=False):
                return library.matmul(x.to(dtype), self.weight, bias=bias, state=state)

    return Linear4bit, Linear8bitLt


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """That of a plain linear layer's output."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _take_over(model: nn.Module) -> None:
    four, eight = _layers()
    for _, module in quantized_layers(model):
        if type(module.weight).__name__ == "Params4bit":
            module.__class__, module.quant_state = four, module.weight.quant_state
        else:
            module.__class__, module.state.SCB = eight, module.weight.SCB
        if module.bias is not None:  # transformers freezes it with the weight
            module.bias.requires_grad_(True)


@torch.no_grad()
def dequantized(model: Any) -> Any:
    """The model with plain fp32 layers of its own classes (Conv1D with its transposed weight), changed in place: what
    the quantised one computes in fp32, ready for merging adapters and for `save_pretrained`. Raises UserError where
    it carries PEFT's layers: adapters are loaded and merged after this."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight
    from transformers.pytorch_utils import Conv1D

    for name, module in list(quantized_layers(model)):
        assert not name.endswith("base_layer"), "adapters are merged into the dequantised base, not before"
        weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).float()
        transposed = issubclass(module.source_cls, Conv1D)
        with torch.device("meta"):
            inputs, outputs = module.in_features, module.out_features
            plain: Any = (
                Conv1D(outputs, inputs)
                if transposed
                else nn.Linear(inputs, outputs, bias=module.bias is not None)
            )
        plain.weight = nn.Parameter(weight.T.contiguous() if transposed else weight)
        plain.bias = module.bias
        model.set_submodule(name, plain.train(module.training))
    _forget(model)
    return model


def _forget(model: Any) -> None:
    """Takes back what transformers notes on a quantised model, and would save."""
    for module in model.modules():
        if (quantizer := vars(module).get("hf_quantizer")) is not None:
            quantizer.remove_quantization_config(module)
        for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            vars(module).pop(name, None)
        if hasattr(module, "config"):
            vars(module.config).pop("_is_quantized", None)


__all__ = [
    "dequantized",
    "elements",
    "facts",
    "fingerprint",
    "is_quantized",
    "is_quantized_parameter",
    "load",
    "refuse_trained",
    "require",
    "scales",
    "stored_bytes",
]
