"""A transformers model with the recipe's adapters in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.adapters import checks, targets
from tunesmith.adapters.chatter import heard
from tunesmith.adapters.configs import PROMPTS, Task, first_line, folder_of, key, peft_config, task_of
from tunesmith.adapters.state import entries, load_entries, read_file
from tunesmith.errors import UserError
from tunesmith.recipe.adapters import Adapter, Lora, OtherPeft, PromptTuning
from tunesmith.shapes import whole_numel

_PEFT_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    NotImplementedError,
    ImportError,
)


@dataclass(frozen=True, slots=True)
class Attached:
    """`model` is a peft.PeftModel; its forward and `generate` take and return what the base model's do. `lr_scale`:
    a factor for the learning rate by parameter name. `changes_base`: the base's weights are not those of its files
    any more. `positions`: how many positions virtual tokens take of those that the model has."""

    model: Any
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list[str])
    lr_scale: dict[str, float] = field(default_factory=dict[str, float])
    changes_base: bool = False
    positions: int = 0


def attach(
    model: Any,
    adapters: Sequence[Adapter],
    task: str,
    base: Path,
    seed: int,
    *,
    tokenizer: Any = None,
    new_weights: Collection[str] = (),
) -> Attached:
    """Puts the adapters into a transformers model, in place, all of them active, and freezes everything else. `task` is
    a Task or the name of a transformers Auto class, `base` the folder that the adapters' paths are relative to,
    `new_weights` the parameters that were drawn at random as the model was loaded, whose modules are trained and saved
    too. The same seed draws the same adapters everywhere. Weights partitioned by ZeRO-3 are read only where PEFT
    gathers them. Raises UserError."""
    kind, notes = task_of(task), list[str]()
    configs = [peft_config(adapter, kind, base) for adapter in adapters]
    checks.check_together(adapters, configs, model)
    heads, said = targets.head_modules(model, kind, new_weights)
    fresh = checks.share_heads(adapters, configs, heads)
    whole = {name for config in configs for name in getattr(config, "modules_to_save", None) or []}
    for adapter, config in zip(adapters, configs, strict=True):
        checks.check_alone(adapter, config, model, kind)
        targets.resolve(adapter, config, model, whole)
        checks.keep_tied(adapter, config, model)
    shared = targets.sharing(model)
    before = _fingerprints(model) if any(isinstance(one, OtherPeft) for one in adapters) else []
    torch.manual_seed(seed)
    with heard(notes):
        peft = _wrapped(model, adapters, configs, kind)
    checks.check_tied(adapters, model, shared)
    for adapter in adapters:
        _fill(peft, adapter, base, fresh, tokenizer)
    changes_base = _changed(adapters, configs, before)
    initial = _initial(peft, adapters, configs)
    peft.initial_adapters = initial  # what `save` takes off again, for the base as its files have it
    for adapter in adapters:
        _set_trained(peft, adapter, fresh)
    if not any(p.requires_grad for p in peft.parameters()):
        notes.append("no adapter is trained")
    return Attached(
        peft,
        {"adapters": [_facts(peft, *pair) for pair in zip(adapters, configs, strict=True)]},
        [*said, *notes],
        _scales(peft, adapters),
        changes_base,
        _positions(configs),
    )


def base_model(model: Any) -> Any:
    """The transformers model within a PeftModel; any other model as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _wrapped(model: Any, adapters: Sequence[Adapter], configs: Sequence[Any], task: Task) -> Any:
    from peft import PeftModel

    try:
        if str(configs[0].peft_type.value) in PROMPTS:
            from tunesmith.adapters.prompts import PromptModel

            if task == "masked_lm":  # PEFT has no such task; this one's forward reads prompts too
                configs[0].task_type = "FEATURE_EXTRACTION"
            return PromptModel(model, configs[0], adapters[0].name)
        peft: Any = PeftModel(model, configs[0], adapters[0].name)
        for adapter, config in zip(adapters[1:], configs[1:], strict=True):
            peft.add_adapter(adapter.name, config)
        if len(adapters) > 1:
            peft.base_model.set_adapter([adapter.name for adapter in adapters])
        return peft
    except _PEFT_ERRORS as error:
        raise UserError(f"{key(adapters[0])}: {first_line(error)}") from None


def _fill(peft: Any, adapter: Adapter, base: Path, fresh: set[str], tokenizer: Any) -> None:
    """Weights that are not drawn at random: of a folder, of a text, or made for a quantised base."""
    if adapter.path is not None:
        folder = folder_of(adapter, base)
        load_entries(peft, adapter.name, read_file(folder), folder, fresh)
    elif isinstance(adapter, PromptTuning) and adapter.prompt_tuning_init_text is not None:
        _say(peft, adapter, adapter.prompt_tuning_init_text, tokenizer)
    elif isinstance(adapter, Lora) and adapter.init_lora_weights == "loftq":
        from tunesmith.adapters.loftq import make_up

        try:
            make_up(peft, adapter.name)
        except (OSError, LookupError) as error:
            raise UserError(f"{key(adapter)}.init_lora_weights: loftq: {first_line(error)}") from None


@torch.no_grad()
def _say(peft: Any, adapter: PromptTuning, text: str, tokenizer: Any) -> None:
    from peft.utils.integrations import gather_params_ctx

    from tunesmith.adapters.prompts import source_embeddings

    if tokenizer is None or not (ids := tokenizer(text, add_special_tokens=False)["input_ids"]):
        raise UserError(f"{key(adapter)}.prompt_tuning_init_text: {text!r} has no tokens")
    weight: nn.Parameter = peft.prompt_encoder[adapter.name].embedding.weight
    words: Any = source_embeddings(peft.base_model)
    repeated = torch.tensor([ids[i % len(ids)] for i in range(len(weight))], device=words.weight.device)
    with gather_params_ctx(words.parameters()):
        weight.copy_(words(repeated).to(weight.dtype))


def _fingerprints(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Each parameter with the sums of its values and of their squares, which any change of them changes."""
    return [(p, _sums(p)) for p in model.parameters()]


def _sums(parameter: nn.Parameter) -> Tensor:
    values = parameter.detach().double()
    return torch.stack([values.sum(), values.square().sum()])


def _changed(
    adapters: Sequence[Adapter], configs: Sequence[Any], before: list[tuple[nn.Parameter, Tensor]]
) -> bool:
    if any(str(getattr(config, "init_lora_weights", "")).startswith(checks.CHANGING) for config in configs):
        return True
    if any(not torch.equal(_sums(p), sums) for p, sums in before):
        raise UserError(
            f"{key(adapters[0])}: {configs[0].peft_type.value} changes the base's weights at the start, so that what "
            "is saved would not fit the base"
        )
    return False


def _initial(peft: Any, adapters: Sequence[Adapter], configs: Sequence[Any]) -> dict[str, dict[str, Tensor]]:
    """A and B as they began, of adapters that took their product out of the base, by their names in a file."""
    state = dict(peft.named_parameters())
    return {
        adapter.name: {
            entry: state[name].detach().clone().contiguous()
            for entry, name in entries(peft, adapter.name).items()
            if ".lora_A." in entry or ".lora_B." in entry
        }
        for adapter, config in zip(adapters, configs, strict=True)
        if str(getattr(config, "init_lora_weights", "")).startswith(checks.CHANGING)
    }


def _set_trained(peft: Any, adapter: Adapter, fresh: set[str]) -> None:
    """Whatever the file of the adapter would hold is trained or not; a head that no file brought always is."""
    parameters = dict(peft.named_parameters())
    if adapter.trainable:
        return
    held = set(entries(peft, adapter.name).values())
    if str(peft.peft_config[adapter.name].peft_type.value) in PROMPTS:
        held |= {name for name in parameters if name.startswith("prompt_encoder.")}
    for name in held & set(parameters):
        parameters[name].requires_grad_(any(f".{module}." in f".{name}" for module in fresh))


def _scales(peft: Any, adapters: Sequence[Adapter]) -> dict[str, float]:
    """LoRA+ (Hayou et al. 2024): B learns `loraplus_lr_ratio` times as fast as A."""
    scales: dict[str, float] = {}
    for adapter in adapters:
        if isinstance(adapter, Lora) and adapter.loraplus_lr_ratio is not None:
            marks = (f".lora_B.{adapter.name}.", f".lora_embedding_B.{adapter.name}")
            hits = [name for name, _ in peft.named_parameters() if any(mark in name for mark in marks)]
            scales |= dict.fromkeys(hits, adapter.loraplus_lr_ratio)
    return scales


def _positions(configs: Sequence[Any]) -> int:
    return sum(int(c.num_virtual_tokens) for c in configs if str(c.peft_type.value) in PROMPTS)


def _facts(peft: Any, adapter: Adapter, config: Any) -> dict[str, Any]:
    kind = str(config.peft_type.value)
    parameters = dict(peft.named_parameters())
    held = set(entries(peft, adapter.name).values())
    if kind in PROMPTS:
        held |= {name for name in parameters if name.startswith("prompt_encoder.")}
    own = [parameters[name] for name in held if name in parameters]
    facts: dict[str, Any] = {
        "name": adapter.name,
        "type": kind,
        "parameters": sum(whole_numel(p) for p in own),
        "trainable_parameters": sum(whole_numel(p) for p in own if p.requires_grad),
        "task_type": None
        if config.task_type is None
        else str(getattr(config.task_type, "value", config.task_type)),
    }
    if kind in PROMPTS:
        return facts | {"virtual_tokens": int(config.num_virtual_tokens)}
    hold = sorted(
        {
            name.split(mark)[0].removeprefix("base_model.model.")
            for name in held
            for mark in _marks(name, adapter.name)
        }
    )
    leaves = Counter(name.rpartition(".")[2] for name in hold)
    return facts | {
        "modules": len(hold),
        "targets": {leaf: leaves[leaf] for leaf in sorted(leaves)},
        "modules_to_save": sorted(getattr(config, "modules_to_save", None) or []),
    }


def _marks(name: str, adapter: str) -> list[str]:
    """What separates a module's name from its adapter's parameter: `.lora_A.default`."""
    if ".modules_to_save." in name or f".{adapter}" not in name:
        return []
    before = name.split(f".{adapter}")[0]
    return [f".{before.rpartition('.')[2]}.{adapter}"]
