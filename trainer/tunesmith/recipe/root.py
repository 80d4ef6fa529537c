"""The recipe: all sections, and the rules that span several of them."""

from __future__ import annotations

import re
from typing import Any, Literal, cast

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_validator,
)

from tunesmith.recipe import rules
from tunesmith.recipe.averaging import Averaging
from tunesmith.recipe.base import Section
from tunesmith.recipe.checkpoint import Checkpoint
from tunesmith.recipe.data import Data
from tunesmith.recipe.distill import Distill
from tunesmith.recipe.evaluation import Evaluation
from tunesmith.recipe.kernels import Kernels
from tunesmith.recipe.model import Model
from tunesmith.recipe.objective import Objective
from tunesmith.recipe.optim import AdamW, Optim
from tunesmith.recipe.parallel import Auto, Parallel
from tunesmith.recipe.regularization import Regularization
from tunesmith.recipe.remember import Remember
from tunesmith.recipe.schedule import Linear, Schedule
from tunesmith.recipe.tasks import Multitask, Tasks, no_tasks
from tunesmith.recipe.tracking import Tracking
from tunesmith.recipe.trainable import Trainable
from tunesmith.recipe.training import Training


def with_default_tags(values: dict[str, Any]) -> dict[str, Any]:
    """A tagged union has no default tag of its own: `optim: {learning_rate: 3e-4}` means AdamW."""
    values = dict(values)
    for section, tag, default in (
        ("optim", "name", "adamw"),
        ("schedule", "lr_scheduler_type", "linear"),
        ("parallel", "strategy", "auto"),
    ):
        if isinstance(values.get(section), dict):
            values[section] = {tag: default, **values[section]}
    return values


class Recipe(Section):
    """One run, complete. Every section but `model`, `data` and `objective` has a default. A recipe of `tasks` has no
    `data` and no `objective` of its own."""

    model: Model
    # None where there are tasks, which whoever reads them asks for each task (`view`)
    data: Data = cast(Data, None)
    objective: Objective = cast(Objective, None)
    tasks: Tasks = Field(default_factory=no_tasks)
    multitask: Multitask = Field(default_factory=Multitask)
    trainable: Trainable = Field(default_factory=Trainable)
    optim: Optim = Field(default_factory=AdamW)
    schedule: Schedule = Field(default_factory=Linear)
    training: Training = Field(default_factory=Training)
    regularization: Regularization = Field(default_factory=Regularization)
    distill: Distill | None = None
    remember: Remember | None = None
    averaging: Averaging | None = None
    parallel: Parallel = Field(default_factory=Auto)
    kernels: Literal["auto", "reference"] | Kernels = "auto"
    evaluation: Evaluation = Field(default_factory=Evaluation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    tracking: Tracking = Field(default_factory=Tracking)
    output_dir: str = "runs"
    run_name: str

    @property
    def each_kernel(self) -> Kernels:
        """`kernels`, with the one word for all written out."""
        if isinstance(self.kernels, Kernels):
            return self.kernels
        return Kernels.model_validate(dict.fromkeys(Kernels.model_fields, self.kernels))

    def view(self, name: str) -> Recipe:
        """The recipe as the task sees it: a run of that task alone."""
        task = self.tasks[name]
        assert task.data is not None, "the finished run was not read"
        given = {key: getattr(task.evaluation, key) for key in task.evaluation.model_fields_set}
        trainable = self.trainable
        if task.head is not None:
            trainable = trainable.model_copy(update={"head": task.head})
        return self.model_copy(
            update={
                "data": task.data,
                "objective": task.objective,
                "trainable": trainable,
                "evaluation": self.evaluation.model_copy(update=given),
                "tasks": {},
                "multitask": Multitask(),
            }
        )

    @property
    def views(self) -> dict[str, Recipe]:
        """The recipe as each of its tasks sees it, by name; itself, under no name, where there are none."""
        return {name: self.view(name) for name in self.tasks} or {"": self}

    @property
    def each_data(self) -> dict[str, Data]:
        """`data`, and that of every task which has it, by the name of the setting."""
        own = {f"tasks.{name}.data": task.data for name, task in self.tasks.items() if task.data is not None}
        return own if self.tasks else {"data": self.data}

    @field_serializer("data", "objective", mode="wrap")
    def _absent(self, value: Any, write: SerializerFunctionWrapHandler) -> Any:
        return None if value is None else write(value)

    @field_validator("run_name")
    @classmethod
    def _is_a_folder_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", value) or ".." in value:
            raise ValueError("must be a plain folder name of letters, digits, '.', '_' and '-'")
        return value

    @model_validator(mode="before")
    @classmethod
    def _default_tags(cls, value: Any) -> Any:
        return with_default_tags(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if problems := rules.check(self, Recipe.model_fields):
            raise ValueError("\n".join(f"{problem.key}: {problem.message}" for problem in problems))
        return self
