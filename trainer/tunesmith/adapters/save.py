"""Adapters as PEFT's files: written from whole tensors, read back, and looked at."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.adapters.configs import PROMPTS
from tunesmith.adapters.state import FILE, PROMPT, entries, load_entries, prompt_table, read_file
from tunesmith.errors import MachineError, UserError


def adapter_state(
    model: Any, whole: Mapping[str, Tensor], extra: Collection[str] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Each adapter's tensors by their names in its file. `whole`: whole tensors by their names in the model's state, of
    all that is not in the base's files. `extra`: names of the base's own parameters that were trained, which go into
    the first file; None: all that are trained now."""
    kinds = {name: str(config.peft_type.value) for name, config in model.peft_config.items()}
    found: dict[str, dict[str, Tensor]] = {}
    held: set[str] = set()
    for name, kind in kinds.items():
        names = entries(model, name)
        held |= set(names.values())
        found[name] = {entry: whole[entry_of] for entry, entry_of in names.items()}
        if kind in PROMPTS:
            found[name][PROMPT] = prompt_table(model, name, whole)
        for entry, initial in model.initial_adapters.get(name, {}).items():
            found[name][entry] = _beside(entry, found[name][entry], initial)
    if extra is None:
        extra = [name for name, p in model.named_parameters() if p.requires_grad and name in whole]
    first = found[next(iter(found))]
    for name in extra:
        if name not in held and not name.startswith("prompt_encoder."):
            first[name] = whole[name]
    return found


def _beside(entry: str, trained: Tensor, initial: Tensor) -> Tensor:
    """The base lost s·B₀·A₀ when it was attached: W + s·(B·A − B₀·A₀) = W + s·[B, −B₀]·[A; A₀]."""
    initial = initial.to(trained.device, trained.dtype)
    return torch.cat((trained, initial), 0) if ".lora_A." in entry else torch.cat((trained, -initial), 1)


def saved_config(model: Any, adapter: str) -> Any:
    """The config of what `save` writes: an initialisation that changed the base is one of the ordinary kind with twice
    the rank, and the same scale."""
    config = copy.deepcopy(model.peft_config[adapter])
    if adapter in model.initial_adapters:
        growth = 2**0.5 if config.use_rslora else 2
        config.init_lora_weights = True
        config.r, config.lora_alpha = 2 * config.r, growth * config.lora_alpha
        config.rank_pattern = {name: 2 * r for name, r in config.rank_pattern.items()}
        config.alpha_pattern = {name: growth * a for name, a in config.alpha_pattern.items()}
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model.get_base_model(), "name_or_path", None) or None
    return config


def save(model: Any, folder: Path, whole: Mapping[str, Tensor], extra: Collection[str] | None = None) -> None:
    """Writes each adapter as PEFT's `save_pretrained` does: the one called default into `folder`, others into folders
    of their names below. Arguments as in `adapter_state`; called on one rank, reads no tensor of the model. Raises
    MachineError where a file is not what was to be written."""
    from safetensors.torch import save_file

    for adapter, tensors in adapter_state(model, whole, extra).items():
        place = folder if adapter == "default" else folder / adapter
        place.mkdir(parents=True, exist_ok=True)
        empty = [name for name, value in tensors.items() if value.numel() == 0]
        if empty or not tensors:
            raise MachineError(
                f"{place}: the adapter {adapter} has no values for {', '.join(empty[:3]) or 'anything'}"
            )
        # tied tensors and views are written each by itself
        apart = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        try:
            save_file(apart, place / FILE, metadata={"format": "pt"})
            saved_config(model, adapter).save_pretrained(
                str(place), auto_mapping_dict=_mapping(model, adapter)
            )
            _check_file(place / FILE, apart)
        except OSError as error:
            raise MachineError(f"{place}: cannot be written: {error.strerror or error}") from None


def _mapping(model: Any, adapter: str) -> dict[str, str] | None:
    """How PEFT finds the class of a base whose task it has no name for."""
    if model.peft_config[adapter].task_type is not None:
        return None
    kind = type(model.get_base_model())
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def _check_file(path: Path, expected: Mapping[str, Tensor]) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wanted = {name: tuple(value.shape) for name, value in expected.items()}
    if found != wanted:
        wrong = sorted(set(found) ^ set(wanted)) or [n for n in wanted if found[n] != wanted[n]]
        raise MachineError(f"{path}: it was not written as it should be: {', '.join(wrong[:3])}")


def load(model: Any, folder: Path) -> None:
    """The weights that `save` wrote, into a model with the same adapters, in place. Every tensor of an adapter must be
    there. Raises UserError."""
    for adapter in model.peft_config:
        place = folder if adapter == "default" else folder / adapter
        if not (place / FILE).is_file():
            raise UserError(f"{place}: there is no {FILE} of the adapter {adapter}")
        tensors = read_file(place)
        for entry, initial in model.initial_adapters.get(adapter, {}).items():
            if entry in tensors:
                tensors[entry] = _apart(place, entry, tensors[entry], initial)
        load_entries(model, adapter, tensors, str(place))


def _apart(folder: Path, entry: str, both: Tensor, initial: Tensor) -> Tensor:
    """The trained half of what `_beside` joined; the other must be what the base lost this time too."""
    is_a = ".lora_A." in entry
    r = initial.shape[0 if is_a else 1]
    if both.shape[0 if is_a else 1] != 2 * r:
        raise UserError(f"{folder}: {entry} has shape {tuple(both.shape)}: it is of other settings")
    trained, then = (both[:r], both[r:]) if is_a else (both[:, :r], -both[:, r:])
    if not torch.allclose(then, initial.to(both.dtype).cpu(), rtol=1e-4, atol=1e-5):
        raise UserError(f"{folder}: {entry} began otherwise: the base or the seed is another one")
    return trained
