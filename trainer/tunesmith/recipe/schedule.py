"""`schedule`: the learning rate over the steps, told apart by `lr_scheduler_type`; all but one_cycle with
warm-up."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunesmith.recipe.base import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class _Schedule(Section):
    """Warm-up is linear, in `warmup_steps`, or `warmup_ratio` of all steps (rounded up): the n-th of w steps
    has n / (w + 1) of the schedule's first value, so that no step is spent on a learning rate of 0."""

    warmup_steps: NonNegative | None = None
    warmup_ratio: Fraction | None = None

    @model_validator(mode="after")
    def _one_warmup(self) -> _Schedule:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("warmup_steps and warmup_ratio exclude each other")
        return self


class Constant(_Schedule):
    lr_scheduler_type: Literal["constant"]


class Linear(_Schedule):
    """Down to `min_lr_ratio` × the learning rate, which the step after the last would have."""

    lr_scheduler_type: Literal["linear"] = "linear"
    min_lr_ratio: Fraction = 0.0


class Cosine(_Schedule):
    lr_scheduler_type: Literal["cosine"]
    min_lr_ratio: Fraction = 0.0


class CosineWithRestarts(_Schedule):
    lr_scheduler_type: Literal["cosine_with_restarts"]
    num_cycles: Positive = 1
    min_lr_ratio: Fraction = 0.0


class Polynomial(_Schedule):
    lr_scheduler_type: Literal["polynomial"]
    power: PositiveFloat = 1.0
    min_lr_ratio: Fraction = 0.0


class Exponential(_Schedule):
    """× `gamma` at every step after the warm-up."""

    lr_scheduler_type: Literal["exponential"]
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.999


class Step(_Schedule):
    """× `gamma` every `step_size` steps."""

    lr_scheduler_type: Literal["step"]
    step_size: Positive
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1


class Cyclic(_Schedule):
    """Triangles between `min_lr_ratio` and 1, `cycle_steps` long (Smith 2017)."""

    lr_scheduler_type: Literal["cyclic"]
    cycle_steps: Annotated[int, Field(ge=2)]
    min_lr_ratio: Fraction = 0.1


class OneCycle(Section):
    """Cosine up from 1/`div_factor` to 1 over `pct_start` of the steps, then down to 1/(`div_factor` ×
    `final_div_factor`) (Smith & Topin 2018). The rise is its warm-up: it takes no other."""

    lr_scheduler_type: Literal["one_cycle"]
    pct_start: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    div_factor: PositiveFloat = 25.0
    final_div_factor: PositiveFloat = 1e4


class WSD(_Schedule):
    """Warm-up, stable, decay: `decay_ratio` of all steps at the end go down (Hu et al. 2024)."""

    lr_scheduler_type: Literal["wsd"]
    decay_ratio: Fraction = 0.1
    decay_type: Literal["linear", "cosine", "sqrt"] = "linear"
    min_lr_ratio: Fraction = 0.0


class ReduceOnPlateau(_Schedule):
    """× `factor` when more than `patience` evaluations in a row bring no improvement of the run's
    `metric_for_best` by more than `threshold` × its best value."""

    lr_scheduler_type: Literal["reduce_on_plateau"]
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    patience: NonNegative = 2
    threshold: NonNegativeFloat = 1e-4
    min_lr_ratio: Fraction = 0.0


Schedule = Annotated[
    Constant
    | Linear
    | Cosine
    | CosineWithRestarts
    | Polynomial
    | Exponential
    | Step
    | Cyclic
    | OneCycle
    | WSD
    | ReduceOnPlateau,
    Field(discriminator="lr_scheduler_type"),
]
