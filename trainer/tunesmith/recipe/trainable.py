"""`trainable`: which parameters move, when, and how fast."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tunesmith.recipe.adapters import Adapter
from tunesmith.recipe.base import Fraction, NonNegative, NonNegativeFloat, Positive, Section
from tunesmith.recipe.moments import Moment
from tunesmith.recipe.selectors import LayersText, SelectorText


class Later(Section):
    """Frozen until `at` (0.2: of all steps; 100: a step; `1 epoch`), then trained: `layers` (`last 2`, `first 2`,
    `2-5`) or `parameters` (as in `freeze`). Their learning rate rises over `warmup_steps` of their own."""

    at: Moment
    layers: LayersText | None = None
    parameters: list[SelectorText] | None = None
    warmup_steps: NonNegative = 0

    @model_validator(mode="after")
    def _names_parameters(self) -> Later:
        if (self.layers is None) == (self.parameters is None):
            raise ValueError("give either layers or parameters")
        return self


class Gradual(Section):
    """Gradual unfreezing (Howard & Ruder 2018, ULMFiT): all but the head begins frozen, and `every` (`1 epoch`; 100:
    steps; 0.2: of all steps) the next `layers` layers from the top are trained too, the embeddings last. Their
    learning rate rises over `warmup_steps` of their own. What `freeze` names stays frozen throughout."""

    every: Moment
    layers: Positive = 1
    warmup_steps: NonNegative = 0


class Head(Section):
    """A head of our own on any backbone: `hidden_layers` gives the width of each hidden layer (none: linear), with
    `activation` behind it and `dropout` before every linear layer (null: `model.dropout`, else 0.1). `pooling` makes
    one vector of a row's tokens: the first token, their mean (null), their maximum, the last one, or a learned
    weighting (attention); heads on every token take none."""

    hidden_layers: list[Positive] = Field(default_factory=list[int])
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    dropout: Fraction | None = None
    pooling: Literal["cls", "mean", "max", "last", "attention"] | None = None


class Trainable(Section):
    """Empty: every parameter is trained. `freeze` names what is not: backbone (all but the head), head, embeddings,
    norms, biases, all, `first 2 layers`, `last 2 layers`, `layers 2-5`, or a shell pattern on parameter names.
    `unfreeze` names exceptions in the same words, what is trained from a later moment on (`{at: 0.2, layers: last
    2}`), or gradual unfreezing (`{every: 1 epoch}`). With `adapters` the model is frozen but for them and the head,
    and only gradual unfreezing opens these. `head` replaces the model's own. `layer_lr_decay` multiplies the learning
    rate once per layer below the head. `learning_rates` gives parameters (named as in `freeze`) a rate of their own;
    the last entry that names a parameter counts. `cache_features` computes what a frozen backbone makes of each row
    once, and trains the head on that."""

    freeze: list[SelectorText] = Field(default_factory=list[str])
    unfreeze: list[SelectorText | Later] | Gradual = Field(default_factory=list[Any])
    adapters: list[Adapter] = Field(default_factory=list[Any])
    head: Head | None = None
    layer_lr_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    learning_rates: dict[SelectorText, NonNegativeFloat] = Field(default_factory=dict[str, float])
    cache_features: bool = False

    @field_validator("adapters", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @property
    def later(self) -> list[Later]:
        """The entries of `unfreeze` that have a moment."""
        return (
            [] if isinstance(self.unfreeze, Gradual) else [u for u in self.unfreeze if isinstance(u, Later)]
        )

    @property
    def exceptions(self) -> list[str]:
        """The entries of `unfreeze` that hold from the start."""
        return [] if isinstance(self.unfreeze, Gradual) else [u for u in self.unfreeze if isinstance(u, str)]
