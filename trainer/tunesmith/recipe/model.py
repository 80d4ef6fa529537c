"""`model`: which pretrained model is trained, and how it is built."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tunesmith.recipe.base import Fraction, Positive, PositiveFloat, Section
from tunesmith.recipe.quantization import Quantization


class TrainTokenizer(Section):
    """A byte-level BPE tokenizer trained on the run's own training text."""

    type: Literal["train_bpe"] = "train_bpe"
    vocab_size: Positive = 8192


class Model(Section):
    """`model_name_or_path` is a local folder or a hub id, or `builtin:minilm` (the quickstart extra).
    With `init: from_config` the weights are random; `config` then gives (or overrides) the fields of the
    model's `config.json`, `model_type` among them where there is no `model_name_or_path`. `add_tokens` are put into
    the tokenizer and, where the embedding has no room for them, into it: new rows begin around the mean of the
    others; a LoRA trains them. `dropout` overrides every dropout probability of the model, `drop_path` that of
    leaving out a whole layer for a row, which rises with the depth to this one at the last layer (stochastic depth,
    Huang et al. 2016); `neftune_noise_alpha` adds uniform noise of ±alpha/√(tokens × width) to the embeddings while
    it trains (Jain et al. 2023). `quantization` holds the frozen base in few bits: nf4, fp4, int8, or with settings
    `{type: nf4, …}`."""

    model_name_or_path: str | None = None
    revision: str | None = None
    init: Literal["pretrained", "from_config"] = "pretrained"
    config: dict[str, Any] = Field(default_factory=dict[str, Any])
    tokenizer: str | TrainTokenizer | None = None
    chat_template: str | None = None
    add_tokens: list[str] = Field(default_factory=list[str])
    attn_implementation: Literal[
        "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "sdpa"
    dropout: Fraction | None = None
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    neftune_noise_alpha: PositiveFloat | None = None
    quantization: Quantization | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False

    @field_validator("quantization", mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        return {"type": value} if value in ("nf4", "fp4", "int8") else value

    @model_validator(mode="after")
    def _has_a_model(self) -> Model:
        if self.model_name_or_path is None and (
            self.init != "from_config" or "model_type" not in self.config
        ):
            raise ValueError(
                "model_name_or_path is missing (or: init: from_config with config: {model_type: …})"
            )
        return self
