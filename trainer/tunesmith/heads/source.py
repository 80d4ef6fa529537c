"""From the recipe's `trainable.head` to a model: a pretrained backbone, whatever head it had, and a new head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tunesmith.errors import UserError
from tunesmith.objectives.base import Objective
from tunesmith.recipe.trainable import Head
from tunesmith.weights import Source

_ROWS = "AutoModelForSequenceClassification"
_TOKENS = ("AutoModelForTokenClassification", "AutoModelForQuestionAnswering")


def head_config(backbone: Any, head: Head, objective: Objective, dropout: float | None) -> Any:
    """The config of a model with this head on the backbone that the config `backbone` describes (or has, where it
    is that of a model with a head of ours). `dropout` is the recipe's `model.dropout`, which the head follows where
    it has none of its own. Raises UserError for an objective or a pooling without such a head."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from tunesmith.heads.config import TunesmithHeadConfig

    name = objective.auto_class.__name__
    if name != _ROWS and name not in _TOKENS:
        raise UserError(
            "trainable.head: is for classification, token_classification and question_answering; this objective "
            "trains the model's own output"
        )
    if name in _TOKENS and head.pooling is not None:
        raise UserError(
            f"trainable.head.pooling: {head.pooling} makes one vector of a row, and this objective's head looks at "
            "every token: leave it out"
        )
    inner = backbone.text_config if is_headed(backbone) else backbone
    if inner.model_type not in CONFIG_MAPPING or type(inner).__module__.startswith("transformers_modules."):
        raise UserError(
            "trainable.head: the model comes with code of its own, which final/ could not name: leave it out"
        )
    chosen = head.dropout if head.dropout is not None else dropout
    return TunesmithHeadConfig(
        text_config=inner,
        head_hidden_layers=head.hidden_layers,
        head_activation=head.activation,
        head_dropout=0.1 if chosen is None else chosen,
        head_pooling=(head.pooling or "mean") if name == _ROWS else None,
        **objective.config_overrides(),
    )


def is_headed(config: Any) -> bool:
    """Whether it is the config of a model with a head of ours."""
    return config.model_type == "tunesmith_head"


def build(source: Source, config: Any) -> tuple[Any, dict[str, Any]]:
    """The model of `config` whole: its backbone as `source` gives it (quantised, or partitioned under ZeRO-3), then
    the head, drawn by the same seed; and what `Source.whole` found. `source.config` is that of the files."""
    from tunesmith.heads.modeling import TunesmithBackbone, backbone_auto_class, headed_class, without_pooler

    if is_headed(source.config):
        held, found = replace(source, auto_class=TunesmithBackbone).whole()
        backbone, prefix = held.backbone, ""
    else:
        backbone, found = replace(source, auto_class=backbone_auto_class(source.config)).whole()
        prefix = "backbone."
    model = _headed(headed_class(source.auto_class), config, without_pooler(backbone))
    _refuse_first_of_causal(model)
    if source.path is None:
        return model, {}
    names = dict(model.named_parameters())
    new = {name for name in names if not name.startswith("backbone.")}
    # a pooler that the files lack is none that this model misses
    missing = {prefix + name for name in found["missing_keys"]} & set(names)
    return model, {"missing_keys": missing | new, "unexpected_keys": set(found["unexpected_keys"])}


def _headed(model_class: Any, config: Any, backbone: Any) -> Any:
    from transformers import initialization

    # what the backbone became: its attention and dtype, and how it is quantised
    config.text_config = backbone.config
    config._attn_implementation = backbone.config._attn_implementation
    with initialization.no_init_weights():
        model = model_class(config, backbone)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # by which PEFT knows quantised layers
        if getattr(backbone, flag, False):
            setattr(model, flag, True)
    for name, part in model.named_children():
        if name != "backbone":
            part.apply(model._initialize_weights)
    return model


def _refuse_first_of_causal(model: Any) -> None:
    """The first token of a causal decoder has seen itself alone: a head on it would learn the labels' frequencies."""
    causal = any(getattr(module, "is_causal", False) for module in model.backbone.modules())
    if model.config.head_pooling == "cls" and causal and not model.reads_twice:
        raise UserError(
            f"trainable.head.pooling: cls: the first token of {type(model.backbone).__name__} sees no other: use "
            "last or mean"
        )
