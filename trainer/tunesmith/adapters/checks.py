"""What PEFT would do wrong, or not at all, without a word: refused by name before anything is attached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from tunesmith.adapters import targets
from tunesmith.adapters.configs import PROMPTS, Task, key
from tunesmith.errors import UserError
from tunesmith.quantized import is_quantized
from tunesmith.recipe.adapters import Adapter, Lora, OtherPeft

CHANGING = ("pissa", "olora")  # initialisations that take their product out of the base's weights


def check_together(adapters: Sequence[Adapter], configs: Sequence[Any], model: Any) -> None:
    names = [adapter.name for adapter in adapters]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"trainable.adapters: two are called {twice[0]}: give each a name of its own")
    parts = {part for name, _ in model.named_modules() for part in name.split(".")}
    for adapter, config in zip(adapters, configs, strict=True):
        if adapter.name in parts or adapter.name in str(config.peft_type.value).lower() + "_":
            raise UserError(f"trainable.adapters: {adapter.name} is a name within the model: choose another")
    if len(adapters) < 2:
        return
    kinds = [str(config.peft_type.value) for config in configs]
    if len(set(kinds)) > 1:
        raise UserError(
            f"trainable.adapters: {' and '.join(sorted(set(kinds)))} cannot be active together in PEFT"
        )
    if kinds[0] in PROMPTS:
        raise UserError(f"trainable.adapters: only one {kinds[0]} can be active in PEFT")
    for adapter, config in zip(adapters, configs, strict=True):
        if str(getattr(config, "init_lora_weights", "")).startswith(CHANGING):
            raise UserError(
                f"{key(adapter)}.init_lora_weights: {config.init_lora_weights} changes the base that the other "
                "adapters stand on: use one adapter"
            )
    if sum(getattr(config, "bias", "none") != "none" for config in configs) > 1:
        raise UserError("trainable.adapters: bias: only one adapter can train the base's biases")


def share_heads(adapters: Sequence[Adapter], configs: Sequence[Any], heads: list[str]) -> set[str]:
    """Names the head's modules among `modules_to_save` of one adapter, unless a folder brings them. Returns those that
    no folder brings."""
    holders = [
        set(config.modules_to_save or []) if hasattr(config, "modules_to_save") else set[str]()
        for config in configs
    ]
    for module in sorted(set[str]().union(*holders, heads)):
        having = [a.name for a, held in zip(adapters, holders, strict=True) if module in held]
        if len(having) > 1:
            raise UserError(
                f"trainable.adapters: {' and '.join(having)} both hold a {module}, and one is used"
            )
    missing = [module for module in heads if not any(module in held for held in holders)]
    if missing:
        at = next((i for i, adapter in enumerate(adapters) if adapter.trainable), 0)
        if not hasattr(configs[at], "modules_to_save"):
            raise UserError(
                f"{key(adapters[at])}: {configs[at].peft_type.value} has no modules_to_save, which would hold "
                f"{', '.join(missing)}"
            )
        configs[at].modules_to_save = [*(configs[at].modules_to_save or []), *missing]
    return set(missing)


def check_alone(adapter: Adapter, config: Any, model: Any, task: Task) -> None:
    kind = str(config.peft_type.value)
    settings = model.config
    quantised = is_quantized(model)
    partitioned = any(hasattr(p, "ds_shape") for p in model.parameters())
    start = str(getattr(config, "init_lora_weights", ""))
    if kind in PROMPTS and getattr(settings, "is_encoder_decoder", False) and task != "seq2seq":
        raise UserError(
            f"{key(adapter)}: {adapter.type} works on an encoder-decoder for seq2seq alone; use lora"
        )
    if isinstance(adapter, OtherPeft) and kind != "LORA" and partitioned:
        raise UserError(
            f"{key(adapter)}: {kind} reads weights that ZeRO-3 has partitioned; use zero2, or lora"
        )
    if kind in PROMPTS and partitioned:
        raise UserError(
            f"{key(adapter)}: {adapter.type}: PEFT reads embeddings outside the modules for which ZeRO-3 gathers them; "
            "use zero2 or fsdp2"
        )
    if getattr(config, "trainable_token_indices", None) and partitioned:
        raise UserError(
            f"{key(adapter)}.trainable_token_indices: PEFT gathers what ZeRO-3 has partitioned on a GPU alone, which "
            "nobody has proved; use zero2 or fsdp2"
        )
    if start == "orthogonal" and quantised:
        raise UserError(
            f"{key(adapter)}.init_lora_weights: orthogonal is drawn in the weights' dtype, which few bits have none of"
        )
    if start.startswith(CHANGING):
        if quantised:
            raise UserError(
                f"{key(adapter)}.init_lora_weights: {start} needs a base that is not quantised; use loftq"
            )
        if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
            raise UserError(
                f"{key(adapter)}.init_lora_weights: {start} with use_rslora and rank_pattern or alpha_pattern cannot "
                "be saved for the base as its files have it"
            )
        if start == "olora" and any(_lies_across(m) for m in model.modules()):
            raise UserError(
                f"{key(adapter)}.init_lora_weights: PEFT takes Conv1D the wrong way round for olora"
            )
    makes_up = isinstance(adapter, Lora) and adapter.init_lora_weights == "loftq" and adapter.path is None
    if makes_up and (not quantised or not getattr(model, "name_or_path", "") or partitioned):
        raise UserError(
            f"{key(adapter)}.init_lora_weights: loftq makes up for the error of a quantised base: it needs "
            "model.quantization: nf4, a pretrained model, and no ZeRO-3"
        )


def _lies_across(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def keep_tied(adapter: Adapter, config: Any, model: Any) -> None:
    """Where the head's weight is the embedding's, what changes one must change the other."""
    if not targets.tied(model):
        return
    both = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if module in both]
    saved = [name for name in names if _named(name, getattr(config, "modules_to_save", None) or [])]
    asked: Any = getattr(config, "target_modules", None)
    if asked and not isinstance(asked, str) and (held := [name for name in names if _named(name, asked)]):
        raise UserError(
            f"{key(adapter)}.target_modules: {held[0]} shares its weight with the model's other end: use "
            "modules_to_save, or trainable_token_indices"
        )
    if getattr(config, "trainable_token_indices", None) and both[1].bias is not None:
        raise UserError(
            f"{key(adapter)}.trainable_token_indices: PEFT loses the bias of the tied {names[-1]}"
        )
    if saved:
        if model.config.is_encoder_decoder or not hasattr(config, "ensure_weight_tying"):
            raise UserError(
                f"{key(adapter)}.modules_to_save: {saved[0]} shares its weight, which PEFT would part; use lora with "
                "trainable_token_indices"
            )
        config.ensure_weight_tying = True
        config.modules_to_tie = config.target_modules_to_tie = None  # as PEFT's config begins with


def check_tied(adapters: Sequence[Adapter], model: Any, shared: Collection[str]) -> None:
    """PEFT keeps together the modules that it knows by name."""
    modules: list[Any] = [model.get_submodule(name) for name in shared]
    if not any(hasattr(module, "modules_to_save") for module in modules):
        return
    first: Any = modules[0]
    if any(module.weight is not first.weight for module in modules):
        raise UserError(
            f"{key(adapters[0])}.modules_to_save: {', '.join(shared)} share a weight, which PEFT would part; use "
            "trainable_token_indices"
        )


def _named(name: str, endings: Collection[str]) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in endings)
