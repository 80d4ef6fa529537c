"""`training`: how long, in what batches and in what precision."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from tunesmith.recipe.base import NonNegative, Positive, PositiveFloat, Section

Precision = Literal["fp32", "bf16", "fp16", "auto", "bf16_master", "bf16_stochastic", "bf16_kahan"]


class Training(Section):
    """`global_batch_size` is in rows per optimizer step over all processes; `per_device_train_batch_size`
    bounds one forward of one process; gradient accumulation follows from both and the world size. `precision:
    auto` is bf16 where the device computes in it natively, else fp32; the start-up report says which. With
    `bf16_master`, `bf16_stochastic` and `bf16_kahan` the parameters are bf16 too: AdamW updates an fp32 copy, rounds
    them stochastically, or keeps what rounding left out.
    `torch_compile` compiles every transformer layer; one that is no single graph is an error."""

    num_train_epochs: PositiveFloat | None = None
    max_steps: Positive | None = None
    global_batch_size: Positive = 32
    per_device_train_batch_size: Positive = 8
    precision: Precision = "fp32"
    torch_compile: bool = False
    seed: NonNegative = 0

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.num_train_epochs is not None and self.max_steps is not None:
            raise ValueError("num_train_epochs and max_steps exclude each other: keep one")
        return self

    @property
    def epochs(self) -> float | None:
        """Epochs to train, 3 where the recipe says nothing; None where `max_steps` counts."""
        return None if self.max_steps is not None else (self.num_train_epochs or 3.0)
