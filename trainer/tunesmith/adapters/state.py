"""Which tensors of a model's state belong to an adapter, and what they are called in its file.

PEFT's own function that picks them is asked with stand-ins on the meta device in place of the values: a sharded model's
tensors are never read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.adapters.chatter import heard
from tunesmith.adapters.configs import PROMPTS
from tunesmith.errors import UserError
from tunesmith.shapes import whole_shape

PROMPT = "prompt_embeddings"
FILE = "adapter_model.safetensors"


def entries(model: Any, adapter: str) -> dict[str, str]:
    """The names in the adapter's file → the names in the model's state. A prompt method's table of embeddings, which an
    encoder may make, is not among them."""
    from peft import get_peft_model_state_dict
    from peft.utils.other import AuxiliaryTrainingWrapper

    stand_ins = {name: torch.empty(whole, device="meta") for name, whole in shapes(model).items()}
    if str(model.peft_config[adapter].peft_type.value) in PROMPTS:
        found: dict[str, Any] = {}
        for name, module in model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                own: Any = module
                inner = {
                    k.removeprefix(f"{name}."): v for k, v in stand_ins.items() if k.startswith(f"{name}.")
                }
                found |= {f"{name}.{k}": v for k, v in own.adapter_state_dict(adapter, inner).items()}
    else:
        with heard([]):
            found = get_peft_model_state_dict(
                model, state_dict=stand_ins, adapter_name=adapter, save_embedding_layers=False
            )
    named = {id(value): name for name, value in stand_ins.items()}
    return {entry: named[id(value)] for entry, value in found.items()}


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The whole shape of every entry of the model's state, sharded or not."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: whole_shape(parameters[name]) if name in parameters else value.shape
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }


def prompt_table(model: Any, adapter: str, whole: Mapping[str, Tensor]) -> Tensor:
    """What the prompt's encoder makes of its whole weights: [virtual tokens, width], fp32."""
    encoder: Any = model.prompt_encoder[adapter]
    config = model.peft_config[adapter]
    prefix = f"prompt_encoder.{adapter}."
    weights = {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}
    if config.inference_mode:
        return weights["embedding.weight"]
    # the encoder's own code on other tensors: the module's may be sharded, and stay so
    tokens = torch.arange(len(weights["embedding.weight"]), device=weights["embedding.weight"].device)
    was = encoder.training
    encoder.eval()
    with torch.no_grad():
        made: Tensor = torch.func.functional_call(encoder, weights, (tokens[None],), strict=True)
    encoder.train(was)
    return made[0]


def read_file(folder: str | Path) -> dict[str, Tensor]:
    """The tensors that PEFT saved in a folder, or under a hub id."""
    from peft import load_peft_weights

    try:
        return load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: holds no weights of an adapter: {' '.join(str(error).split())[:160]}"
        ) from None


@torch.no_grad()
def load_entries(
    model: Any, adapter: str, given: Mapping[str, Tensor], folder: str, fresh: Collection[str] = ()
) -> None:
    """Copies an adapter's tensors into the model, in place. Every one must be there with its shape, but for modules
    that are `fresh`; what else is there must be an entry of the model's state. Raises UserError."""
    wanted = entries(model, adapter)
    state = model.state_dict(keep_vars=True)
    sizes = shapes(model)
    given = dict(given)
    if str(model.peft_config[adapter].peft_type.value) in PROMPTS:
        _load_prompt(model, adapter, given, folder)
    missing = [
        entry
        for entry in wanted
        if entry not in given and not any(f".{module}." in f".{entry}" for module in fresh)
    ]
    unknown = [entry for entry in given if entry not in wanted and entry not in state]
    if missing or unknown:
        what = f"lacks {_few(missing)}" if missing else f"has {_few(unknown)}, which the model has not"
        raise UserError(f"{folder}: {what}: it is of another model, or of other settings")
    for entry, value in given.items():
        name = wanted.get(entry, entry)
        if value.shape != sizes[name]:
            raise UserError(
                f"{folder}: {entry} has shape {tuple(value.shape)}, the model's {tuple(sizes[name])}: it is of "
                "another model, or of other settings"
            )
        put(state[name], value)


def _load_prompt(model: Any, adapter: str, given: dict[str, Tensor], folder: str) -> None:
    """A table takes the place of what an encoder would make."""
    encoder: Any = model.prompt_encoder[adapter]
    config = model.peft_config[adapter]
    if (table := given.pop(PROMPT, None)) is None:
        raise UserError(f"{folder}: lacks {PROMPT}: it is not of a prompt method")
    weight: nn.Parameter = encoder.embedding.weight
    if any(True for name, _ in encoder.named_parameters() if not name.startswith("embedding.")):
        if table.shape[0] != whole_shape(weight)[0]:
            raise UserError(f"{folder}: has {table.shape[0]} virtual tokens, not {whole_shape(weight)[0]}")
        config.inference_mode = True
        encoder.embedding = nn.Embedding.from_pretrained(
            table.to(weight.dtype), freeze=not weight.requires_grad
        )
        for name, _ in list(encoder.named_children()):
            if name != "embedding":
                delattr(encoder, name)
        return
    if table.shape != whole_shape(weight):
        raise UserError(
            f"{folder}: {PROMPT} has shape {tuple(table.shape)}, the model's {tuple(whole_shape(weight))}: it is of "
            "another model, or of other settings"
        )
    put(weight, table)


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copies into a parameter or buffer, gathering what ZeRO-3 has partitioned."""
    from peft.utils.integrations import gather_params_ctx

    if hasattr(target, "ds_shape"):
        with gather_params_ctx([target]):  # pyright: ignore[reportArgumentType]
            target.copy_(value)
    else:
        target.copy_(value)


def _few(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
