"""Backbones with a head of ours, as models of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import ModelOutput, can_return_tuple

from tunesmith.heads.config import TunesmithHeadConfig
from tunesmith.heads.pooling import build_pooling

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def backbone_auto_class(config: Any) -> Any:
    """AutoModel; for an encoder-decoder whose encoder transformers has as a model of its own (T5), that."""
    whole, encoders = (cast(Any, auto)._model_mapping for auto in (AutoModel, AutoModelForTextEncoding))
    # not config.is_encoder_decoder: T5's encoder turns it off in its own config
    reads_twice = type(config) in whole and _takes(whole[type(config)], "decoder_input_ids")
    return AutoModelForTextEncoding if reads_twice and type(config) in encoders else AutoModel


def _takes(model: type, name: str) -> bool:
    return name in inspect.signature(getattr(model, "forward", model)).parameters


def without_pooler(backbone: Any) -> Any:
    """The backbone without the pooler that its own head would read: no gradient would reach it."""
    if "add_pooling_layer" in inspect.signature(type(backbone).__init__).parameters:
        backbone.pooler = None
    return backbone


def build_head(config: TunesmithHeadConfig, width: int, outputs: int) -> nn.Sequential:
    """Dropout and a linear layer for each hidden layer and for the `outputs`, the activation in between."""
    layers: list[nn.Module] = []
    for hidden in config.head_hidden_layers:
        layers += [
            nn.Dropout(config.head_dropout),
            nn.Linear(width, hidden),
            _ACTIVATIONS[config.head_activation](),
        ]
        width = hidden
    return nn.Sequential(*layers, nn.Dropout(config.head_dropout), nn.Linear(width, outputs))


class TunesmithBackbone(PreTrainedModel):
    """The backbone alone, and what its heads have in common. `backbone`: one that has its weights already."""

    config_class = TunesmithHeadConfig
    base_model_prefix = "backbone"
    # whether these are so is the backbone's to say, which is built with the same settings
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: TunesmithHeadConfig, backbone: Any = None) -> None:
        super().__init__(config)
        inner = config.text_config
        built = backbone if backbone is not None else backbone_auto_class(inner).from_config(inner)
        self.backbone = without_pooler(built)
        self.supports_gradient_checkpointing = bool(self.backbone.supports_gradient_checkpointing)
        self.reads_twice = _takes(type(self.backbone), "decoder_input_ids")
        self._caches = _takes(type(self.backbone), "use_cache")
        self._build(config, int(inner.get_text_config().hidden_size))
        self.post_init()

    def _build(self, config: TunesmithHeadConfig, width: int) -> None:
        """Adds the modules behind the backbone."""

    def _answer(self, hidden: Tensor, real: Tensor, targets: Mapping[str, Any]) -> ModelOutput:
        """What the model puts out for the backbone's last hidden states [rows, positions, width]; `real` [rows,
        positions] is true at tokens."""
        return BaseModelOutput(last_hidden_state=cast(Any, hidden))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **options: Any,
    ) -> ModelOutput:
        """The arguments of transformers' models with heads; `options` go to the backbone."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if self.reads_twice:
            given |= self._decoder_inputs(given)
        if self._caches:
            given["use_cache"] = False
        inner = self.backbone(**given, **options)
        hidden = inner.last_hidden_state
        targets = {"labels": labels, "start_positions": start_positions, "end_positions": end_positions}
        output = self._answer(hidden, _real(attention_mask, hidden), targets)
        for name in (
            "hidden_states",
            "attentions",
        ):  # where options ask for them; of a decoder, where there is one
            output[name] = getattr(inner, name, None) or getattr(inner, f"decoder_{name}", None)
        return output

    @classmethod
    def from_config(cls, config: Any, *, trust_remote_code: bool = False, **options: Any) -> Any:
        """As the Auto classes have it."""
        return cls._from_config(config, **options)

    def get_input_embeddings(self) -> Any:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def _decoder_inputs(self, given: dict[str, Any]) -> dict[str, Tensor]:
        """The row again, moved right behind the start token: an encoder-decoder reads it in both halves, and the
        states are the decoder's (Lewis et al. 2020, "BART", sections 3.1 and 3.2). A model without a fixed start token
        (mBART's is the language) moves it itself."""
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        start = self.config.text_config.decoder_start_token_id
        if ids is None:
            raise ValueError("the decoder of this backbone needs input_ids, not inputs_embeds")
        own = {} if mask is None else {"decoder_attention_mask": mask}
        if start is None:
            return own
        shifted = ids.roll(1, dims=1)
        shifted[:, 0] = start
        return own | {"decoder_input_ids": shifted}


class TunesmithHeadForSequenceClassification(TunesmithBackbone):
    """Logits [rows, labels] from a pooled row."""

    def _build(self, config: TunesmithHeadConfig, width: int) -> None:
        self.pooling = build_pooling(config.head_pooling or "mean", width)
        self.head = build_head(config, width, cast(int, config.num_labels))

    def _answer(self, hidden: Tensor, real: Tensor, targets: Mapping[str, Any]) -> ModelOutput:
        logits = self.head(self.pooling(hidden, real))
        loss, labels = None, targets["labels"]
        if labels is not None:
            compute = cast(Any, self.loss_function)
            loss = compute(labels=labels, logits=logits, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class TunesmithHeadForTokenClassification(TunesmithBackbone):
    """Logits [rows, positions, labels]."""

    def _build(self, config: TunesmithHeadConfig, width: int) -> None:
        self.head = build_head(config, width, cast(int, config.num_labels))

    def _answer(self, hidden: Tensor, real: Tensor, targets: Mapping[str, Any]) -> ModelOutput:
        logits = self.head(hidden)
        labels = targets["labels"]
        loss = None if labels is None else cast(Any, self.loss_function)(logits, labels, self.config)
        return TokenClassifierOutput(loss=loss, logits=logits)


class TunesmithHeadForQuestionAnswering(TunesmithBackbone):
    """Logits of the answer's first and last token, [rows, positions] each."""

    def _build(self, config: TunesmithHeadConfig, width: int) -> None:
        self.head = build_head(config, width, 2)

    def _answer(self, hidden: Tensor, real: Tensor, targets: Mapping[str, Any]) -> ModelOutput:
        start, end = (side.squeeze(-1).contiguous() for side in self.head(hidden).split(1, dim=-1))
        loss, first, last = None, targets["start_positions"], targets["end_positions"]
        if first is not None and last is not None:
            loss = cast(Any, self.loss_function)(start, end, first, last)
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end)


def _real(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """Which positions are tokens: bool [rows, positions]."""
    if mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if mask.dim() != 2:
        raise ValueError(f"attention_mask has {mask.dim()} dimensions: a head needs [rows, positions]")
    # prefix tuning's mask begins with positions that have no hidden state
    return mask[:, -hidden.shape[1] :].bool()


_MODELS: tuple[tuple[Any, Any], ...] = (
    (AutoModelForSequenceClassification, TunesmithHeadForSequenceClassification),
    (AutoModelForTokenClassification, TunesmithHeadForTokenClassification),
    (AutoModelForQuestionAnswering, TunesmithHeadForQuestionAnswering),
)


def headed_class(auto_class: Any) -> Any:
    """The model with a head of ours that takes the place of an Auto class's."""
    return next(model for auto, model in _MODELS if auto is auto_class)


def register() -> None:
    """Gives the Auto classes the models."""
    for auto, model in _MODELS:
        auto.register(TunesmithHeadConfig, model, exist_ok=True)
