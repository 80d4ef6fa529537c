"""A plain transformers model with the adapters' changes in its own weights."""

from __future__ import annotations

import copy
from typing import Any

from tunesmith import quantization
from tunesmith.adapters.chatter import heard
from tunesmith.adapters.configs import PROMPTS, first_line
from tunesmith.adapters.save import adapter_state
from tunesmith.adapters.state import load_entries
from tunesmith.errors import UserError

_PEFT_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError)


def merge(model: Any) -> Any:
    """The merged model; the one given is used up. A base that bitsandbytes holds in few bits is dequantised to fp32
    first, and the adapters merged into that. Raises UserError where the method cannot be merged."""
    kinds = sorted({str(config.peft_type.value) for config in model.peft_config.values()})
    if set(kinds) & PROMPTS:
        raise UserError(
            f"--merge: {kinds[0]} stands before the input, not in the model's weights: export the adapter itself"
        )
    if not hasattr(model.base_model, "merge_and_unload"):
        raise UserError(f"--merge: PEFT cannot merge {kinds[0]}: export the adapter itself")
    with heard([]):
        try:
            if quantization.is_quantized(model):
                model = _dequantised(model)
            merged = model.merge_and_unload(safe_merge=True)
        except _PEFT_ERRORS as error:
            raise UserError(f"--merge: PEFT cannot merge {kinds[0]}: {first_line(error)}") from None
    # unloading leaves the output head and the embedding apart where one of them was wrapped
    if getattr(merged.config.get_text_config(), "tie_word_embeddings", False):
        merged.tie_weights()
    merged.requires_grad_(False)
    return merged.eval()


def _dequantised(model: Any) -> Any:
    """The same adapters on the base's weights in fp32: PEFT's merge into a quantised layer would quantise again."""
    from peft import PeftModel

    assert not model.initial_adapters, (
        "an initialisation that changes the base does not go with a quantised one"
    )
    state = adapter_state(model, model.state_dict(), ())
    saved = {name: {entry: v.cpu().clone() for entry, v in own.items()} for name, own in state.items()}
    configs = {name: copy.deepcopy(config) for name, config in model.peft_config.items()}
    base = quantization.dequantized(model.unload())
    first, *others = configs
    again: Any = PeftModel(base, configs[first], first)
    for name in others:
        again.add_adapter(name, configs[name])
    again.base_model.set_adapter(list(configs))
    again.initial_adapters = {}
    for name, tensors in saved.items():
        load_entries(again, name, tensors, "the adapter in memory")
    return again
