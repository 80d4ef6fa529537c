"""`trainable.adapters`: parameter-efficient tuning through PEFT, told apart by `type`; the settings have PEFT's
names and defaults, unless said otherwise."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from tunesmith.recipe.base import Fraction, NonNegative, Positive, PositiveFloat, Section

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
Names = Annotated[list[str], Field(min_length=1)]


class _Adapter(Section):
    """`name` tells several adapters apart. `path` continues from an adapter's folder, whose settings then count: a
    setting given here must agree with them. `trainable: false` uses it as it is."""

    name: Name = "default"
    path: str | None = None
    trainable: bool = True

    @model_validator(mode="after")
    def _is_trained_or_has_a_path(self) -> _Adapter:
        if not self.trainable and self.path is None:
            raise ValueError("trainable: false without path freezes an adapter that nothing has trained")
        return self


class _OnModules(_Adapter):
    """`target_modules`: all-linear (every linear layer but the output head), a list of name endings, or a regular
    expression on whole names; `layers_to_transform` restricts it to these layers, `exclude_modules` leaves modules
    out. `modules_to_save` are trained and saved whole, beside the head of a classifier, which always is."""

    target_modules: Literal["all-linear"] | Names | str = "all-linear"
    exclude_modules: Names | str | None = None
    layers_to_transform: Annotated[list[NonNegative], Field(min_length=1)] | None = None
    modules_to_save: list[str] = Field(default_factory=list[str])


def _is_initialisation(value: bool | str) -> bool | str:
    known = {"gaussian", "pissa", "olora", "loftq", "orthogonal"}
    steps = value.removeprefix("pissa_niter_") if isinstance(value, str) else ""
    if isinstance(value, bool) or value in known or (value.startswith("pissa_niter_") and steps.isdecimal()):
        return value
    raise ValueError(f"there is no {value}; known: true, false, {', '.join(sorted(known))}, pissa_niter_N")


class Lora(_OnModules):
    """Hu et al. 2021. `use_rslora` scales by `lora_alpha` / √`r` (Kalajdzievski 2023); `use_dora` learns direction and
    size apart (Liu et al. 2024); `loraplus_lr_ratio` multiplies B's learning rate (Hayou et al. 2024).
    `init_lora_weights`: true (B is 0), gaussian, pissa or pissa_niter_N (Meng et al. 2024), olora (Büyükakyüz 2024),
    loftq (Li et al. 2023), orthogonal. `rank_pattern` and `alpha_pattern` give modules their own `r` and
    `lora_alpha`. `trainable_token_indices` trains these rows of the embedding."""

    type: Literal["lora"]
    r: Positive = 16
    lora_alpha: PositiveFloat = 32.0
    lora_dropout: Fraction = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    loraplus_lr_ratio: PositiveFloat | None = None
    init_lora_weights: Annotated[bool | str, AfterValidator(_is_initialisation)] = True
    rank_pattern: dict[str, Positive] = Field(default_factory=dict[str, int])
    alpha_pattern: dict[str, PositiveFloat] = Field(default_factory=dict[str, float])
    trainable_token_indices: list[NonNegative] | None = None

    @model_validator(mode="after")
    def _has_effect(self) -> Lora:
        if self.loraplus_lr_ratio is not None and not self.trainable:
            raise ValueError("loraplus_lr_ratio has no effect: trainable is false")
        return self


class IA3(_Adapter):
    """Liu et al. 2022: learned scales on keys, values and `feedforward_modules`' inputs; without `target_modules`
    those that PEFT knows for the architecture."""

    type: Literal["ia3"]
    target_modules: Names | str | None = None
    feedforward_modules: list[str] | str | None = None
    modules_to_save: list[str] = Field(default_factory=list[str])


class PromptTuning(_Adapter):
    """Lester et al. 2021: `num_virtual_tokens` learned embeddings before the input, drawn at random or those of
    `prompt_tuning_init_text`."""

    type: Literal["prompt_tuning"]
    num_virtual_tokens: Positive = 20
    prompt_tuning_init_text: Annotated[str, StringConstraints(min_length=1)] | None = None


class PrefixTuning(_Adapter):
    """Li & Liang 2021: learned keys and values before every layer's, through an MLP of `encoder_hidden_size` where
    `prefix_projection`."""

    type: Literal["prefix_tuning"]
    num_virtual_tokens: Positive = 20
    prefix_projection: bool = False
    encoder_hidden_size: Positive | None = None

    @model_validator(mode="after")
    def _has_effect(self) -> PrefixTuning:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("encoder_hidden_size has no effect: prefix_projection is false")
        return self


class PTuning(_Adapter):
    """Liu et al. 2021: virtual tokens that an encoder makes (`encoder_reparameterization_type`). An MLP has two hidden
    layers and no dropout; `encoder_num_layers` and `encoder_dropout` are an LSTM's."""

    type: Literal["p_tuning"]
    num_virtual_tokens: Positive = 20
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: Positive | None = None
    encoder_num_layers: Positive = 2
    encoder_dropout: Fraction = 0.0

    @model_validator(mode="after")
    def _has_effect(self) -> PTuning:
        if self.encoder_reparameterization_type == "MLP" and (
            self.encoder_num_layers != 2 or self.encoder_dropout
        ):
            raise ValueError("encoder_num_layers and encoder_dropout have no effect on an MLP: use LSTM")
        if self.encoder_dropout and self.encoder_num_layers == 1:
            raise ValueError(
                "encoder_dropout has no effect: it stands between layers of the LSTM, which has 1"
            )
        return self


class OtherPeft(_Adapter):
    """Any other method of the installed PEFT: `peft_type` is its name (VERA, OFT, BOFT, …), `config` the fields of its
    config."""

    type: Literal["peft"]
    peft_type: str
    config: dict[str, Any] = Field(default_factory=dict[str, Any])


class Existing(_Adapter):
    """An adapter as its folder has it, whatever its method: `path` is where PEFT saved it."""

    type: Literal["existing"]

    @model_validator(mode="after")
    def _has_a_path(self) -> Existing:
        if self.path is None:
            raise ValueError("path: is missing: the folder of the adapter")
        return self


Adapter = Annotated[
    Lora | IA3 | PromptTuning | PrefixTuning | PTuning | OtherPeft | Existing, Field(discriminator="type")
]
