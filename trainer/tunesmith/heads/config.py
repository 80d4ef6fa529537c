"""The config of a backbone with a head of ours: `model_type: tunesmith_head`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

Activation = Literal["gelu", "relu", "silu", "tanh"]
Pooling = Literal["cls", "mean", "max", "last", "attention"]


class TunesmithHeadConfig(PreTrainedConfig):
    """`text_config` is the backbone's, under the name by which transformers, PEFT and accelerate look for one. The
    fields of the head are those of the recipe's `trainable.head`; the labels are in transformers' own fields."""

    model_type = "tunesmith_head"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}  # pyright: ignore[reportIncompatibleMethodOverride]
    has_no_defaults_at_init = True

    text_config: Any = None
    head_hidden_layers: Any = ()
    head_activation: Activation = "gelu"
    head_dropout: float = 0.1
    head_pooling: Pooling | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # the Auto classes need the models only once there is a config: importing them takes torch
        from tunesmith.heads import modeling

        modeling.register()
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            self.text_config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
        self.head_hidden_layers = list(self.head_hidden_layers)
        super().__post_init__(**kwargs)


def register() -> None:
    """Gives AutoConfig the config."""
    AutoConfig.register(TunesmithHeadConfig.model_type, TunesmithHeadConfig, exist_ok=True)
