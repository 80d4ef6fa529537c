"""The recipe: all sections, and the rules that span several of them."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tunesmith.recipe.base import Section
from tunesmith.recipe.checkpoint import Checkpoint
from tunesmith.recipe.data import Data
from tunesmith.recipe.evaluation import Evaluation
from tunesmith.recipe.model import Model
from tunesmith.recipe.objective import Objective
from tunesmith.recipe.optim import AdamW, Optim
from tunesmith.recipe.parallel import Parallel
from tunesmith.recipe.schedule import Linear, Schedule
from tunesmith.recipe.tracking import Tracking
from tunesmith.recipe.trainable import Trainable
from tunesmith.recipe.training import Training

_PACKABLE = {"causal_lm", "sft"}
_GENERATING = {"causal_lm", "sft", "seq2seq"}


class Recipe(Section):
    """One run, complete. Every section but `model`, `data` and `objective` has a default."""

    model: Model
    data: Data
    objective: Objective
    trainable: Trainable = Field(default_factory=Trainable)
    optim: Optim = Field(default_factory=AdamW)
    schedule: Schedule = Field(default_factory=Linear)
    training: Training = Field(default_factory=Training)
    parallel: Parallel = Field(default_factory=Parallel)
    kernels: Literal["auto", "reference"] = "auto"
    evaluation: Evaluation = Field(default_factory=Evaluation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    tracking: Tracking = Field(default_factory=Tracking)
    output_dir: str = "runs"
    run_name: str

    @field_validator("run_name")
    @classmethod
    def _is_a_folder_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", value) or ".." in value:
            raise ValueError("must be a plain folder name of letters, digits, '.', '_' and '-'")
        return value

    @model_validator(mode="before")
    @classmethod
    def _default_tags(cls, value: Any) -> Any:
        # a tagged union has no default tag of its own: `optim: {learning_rate: 3e-4}` means AdamW
        if isinstance(value, dict):
            value = dict(value)
            for section, tag, default in (
                ("optim", "name", "adamw"),
                ("schedule", "lr_scheduler_type", "linear"),
            ):
                if isinstance(value.get(section), dict):
                    value[section] = {tag: default, **value[section]}
        return value

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if self.data.packing and self.objective.type not in _PACKABLE:
            raise ValueError(
                f"data.packing: packs causal_lm and sft only, the objective is {self.objective.type}"
            )
        if self.evaluation.generate is not None and self.objective.type not in _GENERATING:
            raise ValueError(f"evaluation.generate: {self.objective.type} does not generate text")
        has_eval = bool(self.data.eval) or (self.data.split is not None and self.data.split.eval > 0)
        if not has_eval:
            if self.evaluation.early_stopping is not None:
                raise ValueError(
                    "evaluation.early_stopping: needs evaluation rows: set data.eval or data.split.eval"
                )
            if self.schedule.lr_scheduler_type == "reduce_on_plateau":
                raise ValueError(
                    "schedule.lr_scheduler_type: reduce_on_plateau needs evaluation rows: set data.eval or data.split.eval"
                )
        return self
