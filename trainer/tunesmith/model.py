"""The tokenizer and the model: from a folder, a hub id, the quickstart extra, or from nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from tunesmith import quantization
from tunesmith.errors import UserError
from tunesmith.heads.source import build, head_config
from tunesmith.hub import resolve_path
from tunesmith.objectives.base import Objective
from tunesmith.recipe.model import Model, TrainTokenizer
from tunesmith.recipe.trainable import Head
from tunesmith.regularize import attach, configure
from tunesmith.shapes import whole_numel
from tunesmith.unpartitioned import unpartitioned
from tunesmith.weights import Source


@dataclass(slots=True)
class Loaded:
    """A model with what its loading found out."""

    model: Any
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: list[str] = field(default_factory=list[str])
    fill: Callable[[torch.device], None] = lambda device: None


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
    path = resolve_path(name, base, "model.tokenizer")
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
    if known := [token for token in settings.add_tokens if token in tokenizer.get_vocab()]:
        notes.append(f"model.add_tokens: the tokenizer has {_few(known)} already")
    tokenizer.add_tokens(settings.add_tokens)
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


def load_model(
    settings: Model,
    base: Path,
    objective: Objective,
    tokenizer: Any,
    seed: int,
    *,
    empty: bool = False,
    compute_dtype: torch.dtype = torch.float32,
    head: Head | None = None,
    begin: Callable[[Any], Mapping[str, Any]] | None = None,
) -> Loaded:
    """The model with the objective's head, or with `head` on its backbone, in fp32 on the CPU. New weights are drawn
    by `seed`. `empty`: on the meta device, to be sharded; then `fill` loads; not with a `head` or `begin`.
    `compute_dtype`: what quantised layers compute in. `begin` gives the whole model other weights; returns facts."""
    assert not (empty and (head is not None or begin is not None)), "such a model is built whole"
    path = None if settings.model_name_or_path is None else resolve_path(settings.model_name_or_path, base)
    config = _config(settings, path, {} if head is not None else objective.config_overrides(), tokenizer)
    loaded = Loaded(None)
    if unknown := sorted(set(settings.config) - _config_fields(type(config))):
        raise UserError(f"model.config: {type(config).__name__} has no {', '.join(unknown)}")
    loaded.facts |= configure(config, settings)
    source = _source(settings, path, config, objective, seed, compute_dtype)
    if empty and not source.has_other_labels():
        loaded.model = _attempt(settings, objective, source.empty)

        def fill(device: torch.device) -> None:
            found = _attempt(settings, objective, lambda: source.fill(loaded.model, device))
            _tell(loaded, source.path, found)

        loaded.fill = fill
    elif head is not None:
        whole = head_config(config, head, objective, settings.dropout)
        loaded.model, found = _attempt(settings, objective, lambda: build(source, whole))
        _tell(loaded, source.path, found)
        loaded.facts["head"] = {
            name.removeprefix("head_"): getattr(whole, name)
            for name in ("head_hidden_layers", "head_activation", "head_dropout", "head_pooling")
        }
    else:
        with nullcontext() if begin is None else unpartitioned():
            loaded.model, found = _attempt(settings, objective, source.whole)
            _tell(loaded, source.path, found)
            loaded.facts |= {} if begin is None else begin(loaded.model)
    _fit_vocabulary(loaded, settings, tokenizer, seed)
    loaded.facts |= attach(loaded.model, settings)
    if settings.gradient_checkpointing:
        _checkpoint_activations(loaded.model)
    if settings.trust_remote_code:
        loaded.notes.append("trust_remote_code: code that comes with the model runs in this process")
    total = sum(whole_numel(p) for p in loaded.model.parameters())
    attention = getattr(loaded.model.config, "_attn_implementation", "unknown")
    loaded.facts |= quantization.facts(loaded.model)
    loaded.facts |= {
        "model_class": type(loaded.model).__name__,
        "parameters": total,
        "attn_implementation": attention,
    }
    return loaded


def _checkpoint_activations(model: Any) -> None:
    if not model.supports_gradient_checkpointing:
        raise UserError(f"model.gradient_checkpointing: {type(model).__name__} does not support it")
    # transformers 5.2x renames it; the old name warns
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _config(settings: Model, path: str | None, own: dict[str, Any], tokenizer: Any) -> Any:
    """The model's config with the recipe's fields in it, and `own`, the objective's."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    fields = {name: value for name, value in settings.config.items() if name != "model_type"}
    fields |= own
    if path is None:
        fields = {"vocab_size": len(tokenizer), **_special_ids(tokenizer), **fields}
        try:
            config: Any = AutoConfig.for_model(settings.config["model_type"], **fields)
        except (ValueError, StrictDataclassError) as error:
            raise UserError(f"model.config: {_one_line(error)}") from None
        if config.is_encoder_decoder and "decoder_start_token_id" not in fields:
            # T5's decoder starts with padding, which its config leaves to the file; BART's with the end marker
            own_start = getattr(config, "decoder_start_token_id", None) is not None
            config.decoder_start_token_id = tokenizer.eos_token_id if own_start else tokenizer.pad_token_id
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
    return config


def _config_fields(config_class: Any) -> set[str]:
    """What a config knows: transformers keeps any other name too, without effect."""
    declared: dict[str, Any] = getattr(config_class, "__dataclass_fields__", {})
    beside = ["decoder_start_token_id"] if config_class.is_encoder_decoder else []
    return {*declared, *vars(config_class()), *config_class.attribute_map, *beside, "model_type"}


def _source(
    settings: Model,
    path: str | None,
    config: Any,
    objective: Objective,
    seed: int,
    compute_dtype: torch.dtype,
) -> Source:
    if settings.quantization is not None:
        quantization.require()
    return Source(
        objective.auto_class,
        config,
        path if settings.init == "pretrained" else None,
        settings.revision,
        settings.attn_implementation,
        settings.trust_remote_code,
        seed,
        settings.quantization,
        compute_dtype,
    )


_T = TypeVar("_T")


def _attempt(settings: Model, objective: Objective, action: Callable[[], _T]) -> _T:
    """The action's result, transformers' errors as the user's."""
    try:
        return action()
    except ImportError as error:
        raise UserError(
            f"model.attn_implementation: {settings.attn_implementation}: {_first_line(error)}"
        ) from None
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        name = objective.auto_class.__name__
        raise UserError(f"model.model_name_or_path: does not load as {name}: {_first_line(error)}") from None


def _tell(loaded: Loaded, path: str | None, found: dict[str, Any]) -> None:
    if path is None:
        loaded.facts["weights"] = "random (init: from_config)"
        return
    loaded.facts["weights"] = str(path)
    if new := sorted(found["missing_keys"]):
        loaded.facts["new_weights"] = new
        loaded.notes.append(f"new weights, drawn at random: {_few(new)}")
    if unused := sorted(found["unexpected_keys"]):
        loaded.facts["unused_weights"] = unused
        loaded.notes.append(f"weights of the checkpoint that this model does not use: {_few(unused)}")


def _fit_vocabulary(loaded: Loaded, settings: Model, tokenizer: Any, seed: int) -> None:
    embeddings: nn.Embedding | None = loaded.model.get_input_embeddings()
    if embeddings is None or (new := len(tokenizer) - embeddings.num_embeddings) <= 0:
        return
    if new > len(settings.add_tokens):
        raise UserError(
            f"model.tokenizer: it has {len(tokenizer)} tokens, the model's embedding {embeddings.num_embeddings}: "
            "they do not belong together (or name the new ones in model.add_tokens)"
        )
    torch.manual_seed(seed)
    loaded.model.resize_token_embeddings(len(tokenizer))  # around the mean of the others (Hewitt 2021)
    loaded.facts["new_embeddings"] = new
    loaded.notes.append(f"the embedding has {new} new rows, for model.add_tokens")


def _special_ids(tokenizer: Any) -> dict[str, int]:
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name, None) is not None}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
