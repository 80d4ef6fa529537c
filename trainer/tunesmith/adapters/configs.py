"""A recipe's adapter as PEFT's config: its fields checked, what PEFT would take without effect refused."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from tunesmith.errors import UserError
from tunesmith.recipe.adapters import (
    IA3,
    Adapter,
    Existing,
    Lora,
    OtherPeft,
    PrefixTuning,
    PromptTuning,
    PTuning,
)

Task = Literal["causal_lm", "seq2seq", "sequence", "token", "question_answering", "masked_lm"]
TASKS: tuple[Task, ...] = get_args(Task)

PROMPTS = frozenset({"PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"})
"""The methods whose parameters stand before the input, not in the model's layers."""

_PEFT_TASKS: dict[Task, str | None] = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "sequence": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "masked_lm": None,
}
_AUTO: dict[str, Task] = {
    "CausalLM": "causal_lm",
    "ImageTextToText": "causal_lm",
    "Seq2SeqLM": "seq2seq",
    "SequenceClassification": "sequence",
    "TokenClassification": "token",
    "QuestionAnswering": "question_answering",
    "MaskedLM": "masked_lm",
    "PreTraining": "masked_lm",
    "NextSentencePrediction": "sequence",
}
_REFUSED = {
    "ADALORA": "it moves rank between layers by the gradients of every step, which engines do not hand out; use "
    "lora with rank_pattern",
    "XLORA": "it mixes adapters that must be trained before; train them one by one",
    "POLY": "it wants a task id with every row",
    "MULTITASK_PROMPT_TUNING": "it wants a task id with every row",
    "CPT": "it wants a type with every token, and a loss of its own",
    "CARTRIDGE": "it is distilled from a corpus, not trained on rows",
    "SHADOW": "its layers hand each other what is no tensor",
    "ADAPTION_PROMPT": "PEFT puts it into the layers of old versions of transformers",
}
_OWN = {
    "IA3": "ia3",
    "PROMPT_TUNING": "prompt_tuning",
    "PREFIX_TUNING": "prefix_tuning",
    "P_TUNING": "p_tuning",
}
_NEEDS_DATA = {"eva", "corda", "lora_ga"}  # initialisations that look at activations or gradients first
_OURS = {
    "type",
    "name",
    "path",
    "trainable",
    "loraplus_lr_ratio",
    "peft_type",
    "config",
    "prompt_tuning_init_text",
}
_KINDS = {
    "lora": "LORA",
    "ia3": "IA3",
    "prompt_tuning": "PROMPT_TUNING",
    "prefix_tuning": "PREFIX_TUNING",
    "p_tuning": "P_TUNING",
}


def task_of(name: str) -> Task:
    """The task of a transformers Auto class, by its name (`AutoModelForCausalLM`), or of its own name."""
    if name in TASKS:
        return name
    task = _AUTO.get(name.removeprefix("AutoModelFor"))
    if task is None:
        raise UserError(f"trainable.adapters: no adapter is known for {name}")
    return task


def key(adapter: Adapter) -> str:
    """What an error of an adapter begins with."""
    return "trainable.adapters" if adapter.name == "default" else f"trainable.adapters: {adapter.name}"


def peft_config(adapter: Adapter, task: Task, base: Path) -> Any:
    """PEFT's config: of the folder where the adapter has a `path`, else of its settings. Raises UserError."""
    from tunesmith.adapters.chatter import heard

    with heard([]):
        return _of_settings(adapter, task) if adapter.path is None else _of_folder(adapter, base)


def folder_of(adapter: Adapter, base: Path) -> str:
    """The folder (relative to `base`, the recipe's) or hub id of an adapter that has a `path`."""
    assert adapter.path is not None
    for candidate in (base / adapter.path, Path(adapter.path).expanduser()):
        if candidate.is_dir():
            return str(candidate.resolve())
    if adapter.path.startswith((".", "/", "~")) or adapter.path.count("/") != 1:
        raise UserError(f"{key(adapter)}.path: there is no folder {adapter.path}")
    return adapter.path


def _of_settings(adapter: Adapter, task: Task) -> Any:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    classes: Any = PEFT_TYPE_TO_CONFIG_MAPPING
    match adapter:
        case OtherPeft():
            return _other(adapter, task)
        case Lora() | IA3():
            fields = adapter.model_dump(exclude=_OURS)
            fields["modules_to_save"] = list(adapter.modules_to_save) or None
            # PEFT divides by r without asking, and stores whole numbers as such
            if isinstance(adapter, Lora):
                fields["lora_alpha"] = _whole(adapter.lora_alpha)
                fields["alpha_pattern"] = {name: _whole(a) for name, a in adapter.alpha_pattern.items()}
                if adapter.init_lora_weights == "loftq":  # drawn as usual, replaced once it is attached
                    fields["init_lora_weights"] = True
        case PromptTuning() | PrefixTuning() | PTuning():
            fields = adapter.model_dump(exclude=_OURS, exclude_none=True)
        case Existing():
            raise AssertionError("an existing adapter has a path")
    return _built(adapter, classes[_KINDS[adapter.type]], fields | {"task_type": _PEFT_TASKS[task]})


def _whole(number: float) -> float | int:
    return int(number) if number.is_integer() else number


def _other(adapter: OtherPeft, task: Task) -> Any:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    classes: Any = PEFT_TYPE_TO_CONFIG_MAPPING
    kind = adapter.peft_type.upper()
    known = sorted({str(one.value) for one in classes} - set(_REFUSED))
    if kind in _REFUSED:
        raise UserError(f"{key(adapter)}.peft_type: {kind} cannot be trained here: {_REFUSED[kind]}")
    if kind not in known:
        hint = _meant(kind, known)
        raise UserError(
            f"{key(adapter)}.peft_type: there is no {adapter.peft_type}{hint}; known: {', '.join(known)}"
        )
    if kind in _OWN:
        raise UserError(f"{key(adapter)}: {kind} has a type of its own: type: {_OWN[kind]}")
    config_class = classes[PeftType(kind)]
    return _built(adapter, config_class, adapter.config | {"task_type": _PEFT_TASKS[task]})


def _built(adapter: Adapter, config_class: Any, fields: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(config_class) if field.init}
    for name in fields:
        if name not in known:
            raise UserError(
                f"{key(adapter)}: {config_class.__name__} has no {name}{_meant(name, sorted(known))}"
            )
    if fields.get("init_lora_weights") in _NEEDS_DATA:
        raise UserError(
            f"{key(adapter)}.init_lora_weights: {fields['init_lora_weights']} looks at data before training, which is "
            "not done here; use pissa, olora or orthogonal"
        )
    layers = fields.pop("layers_to_transform", None)
    try:
        config = config_class(**fields)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{key(adapter)}: {first_line(error)}") from None
    if layers is not None:  # which PEFT takes beside a list of names alone; `resolve` makes one
        config.layers_to_transform = layers
    return config


def _of_folder(adapter: Adapter, base: Path) -> Any:
    from peft import PeftConfig

    folder = folder_of(adapter, base)
    try:
        config: Any = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{key(adapter)}.path: {folder} holds no adapter: {first_line(error)}") from None
    kind = str(config.peft_type.value)
    if kind in _REFUSED:
        raise UserError(f"{key(adapter)}.path: {kind} cannot be used here: {_REFUSED[kind]}")
    wanted = adapter.peft_type.upper() if isinstance(adapter, OtherPeft) else _KINDS.get(adapter.type, kind)
    if kind != wanted:
        raise UserError(f"{key(adapter)}.path: {folder} is of type {kind}, not {wanted}")
    for name, given in _given(adapter).items():
        if _plain(getattr(config, name, None)) != _plain(given):
            saved = _plain(getattr(config, name, None))
            raise UserError(
                f"{key(adapter)}.{name}: is {given}, but {folder} was trained with {saved}: leave it out"
            )
    made = kind in PROMPTS and (getattr(config, "prefix_projection", False) or kind == "P_TUNING")
    if made and adapter.trainable:
        raise UserError(
            f"{key(adapter)}.path: only what the encoder of {adapter.path} made was saved, not the encoder: set "
            "trainable: false"
        )
    # a trained prompt is a table of embeddings, whatever made it
    config.inference_mode = made
    return config


def _given(adapter: Adapter) -> dict[str, Any]:
    """The settings that are not their defaults: a resolved recipe names every one."""
    if isinstance(adapter, OtherPeft):
        return adapter.config
    fields = type(adapter).model_fields
    values = adapter.model_dump(exclude=_OURS)
    return {name: v for name, v in values.items() if v != fields[name].get_default(call_default_factory=True)}


def _plain(value: Any) -> Any:
    """Comparable: PEFT keeps lists as sets, numbers as ints, and enums."""
    if isinstance(value, set | list | tuple):
        return sorted(map(str, value))
    return str(getattr(value, "value", value)) if not isinstance(value, int | float) else float(value)


def _meant(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
