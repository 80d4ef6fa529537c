"""`tasks` and `multitask`: several data sets, each with its objective and head, on one backbone."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from tunesmith.recipe.base import NonNegativeFloat, Positive, PositiveFloat, Section
from tunesmith.recipe.data import Data
from tunesmith.recipe.evaluation import EarlyStopping
from tunesmith.recipe.objective import Objective
from tunesmith.recipe.trainable import Head

TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


class TaskEvaluation(Section):
    """`metrics: null` computes all that the task's objective has. `metric_for_best` enters the mean over the tasks that
    chooses `final: best`, and decides `early_stopping`, after which the task is drawn no more."""

    metrics: list[str] | None = None
    metric_for_best: str | None = None
    greater_is_better: bool | None = None
    early_stopping: EarlyStopping | None = None

    @model_validator(mode="after")
    def _direction_has_a_metric(self) -> TaskEvaluation:
        if self.greater_is_better is not None and self.metric_for_best is None:
            raise ValueError("greater_is_better has no effect without metric_for_best")
        return self


class Task(Section):
    """`data` and `objective` as those of a run of one task, or `run`: the folder of a finished run, whose data,
    objective, labels and head they are then. `weight` is of its loss; with 0 it is evaluated only. `head` as
    `trainable.head`."""

    data: Data | None = None
    objective: Objective | None = None
    run: str | None = None
    head: Head | None = None
    weight: NonNegativeFloat = 1.0
    evaluation: TaskEvaluation = Field(default_factory=TaskEvaluation)

    @model_validator(mode="after")
    def _from_one_place(self) -> Task:
        if self.run is None:
            for name in ("data", "objective"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name}: is missing (or: run, the folder of a finished run)")
        else:
            if self.head is not None:
                raise ValueError("head: is that of run: leave it out")
        return self


class ProportionalMixing(Section):
    """Every window has rows of one task, each task as many windows as it has rows."""

    type: Literal["proportional"]


class TemperatureMixing(Section):
    """Every window has rows of one task; a task's share of the windows goes with (its rows)^(1/`temperature`): 1 is
    proportional, a high one gives all tasks alike (Raffel et al. 2020)."""

    type: Literal["temperature"]
    temperature: PositiveFloat = 2.0


class RoundRobinMixing(Section):
    """Every window has rows of one task, the tasks in turn."""

    type: Literal["round_robin"]


class AnnealedMixing(Section):
    """Every window has rows of one task; a task's share of the windows goes with (its rows)^α, and α from `start` to
    `end`, linearly over the run (Stickland & Murray 2019)."""

    type: Literal["annealed"]
    start: NonNegativeFloat = 1.0
    end: NonNegativeFloat = 0.2


class TogetherMixing(Section):
    """Every window has rows of every task: equally many, or as many as `rows` says of each. An epoch is that of the
    task `epoch`, or as many windows as it takes to have as many rows as all tasks have together."""

    type: Literal["together"]
    rows: dict[TaskName, Positive] | None = None
    epoch: TaskName | None = None


Mixing = Annotated[
    ProportionalMixing | TemperatureMixing | RoundRobinMixing | AnnealedMixing | TogetherMixing,
    Field(discriminator="type"),
]


class FixedWeights(Section):
    """The tasks' own weights."""

    type: Literal["fixed"]


class UncertaintyWeighting(Section):
    """A learnt log-variance s per task: weight × (exp(−s) × loss + s/2), half of exp(−s) for squared errors (Kendall et
    al. 2018). `learning_rate` is that of the log-variances."""

    type: Literal["uncertainty"]
    learning_rate: PositiveFloat = 1e-3


class GradNorm(Section):
    """Factors that bring the tasks' gradients of the last shared matrix to like norms, larger for a task that learns
    slower than the others, by the power `alpha` of how much (Chen et al. 2018). `learning_rate` is that of the
    factors."""

    type: Literal["gradnorm"]
    alpha: NonNegativeFloat = 1.5
    learning_rate: PositiveFloat = 0.025


class DWA(Section):
    """Dynamic weight average: a task whose loss fell less from one interval to the next gets a larger factor, softmax
    of the quotients / `temperature` (Liu et al. 2019). `every`: the interval, an epoch or so many steps."""

    type: Literal["dwa"]
    temperature: PositiveFloat = 2.0
    every: Positive | Literal["epoch"] = "epoch"


Balancing = Annotated[FixedWeights | UncertaintyWeighting | GradNorm | DWA, Field(discriminator="type")]


def _proportional() -> ProportionalMixing:
    return ProportionalMixing(type="proportional")


def _fixed() -> FixedWeights:
    return FixedWeights(type="fixed")


class Multitask(Section):
    """How several `tasks` share a run. `mixing`: which rows a window has. `balancing`: what becomes of the tasks'
    weights while they are trained."""

    mixing: Mixing = Field(default_factory=_proportional)
    balancing: Balancing = Field(default_factory=_fixed)


Tasks = dict[TaskName, Task]


def no_tasks() -> dict[str, Any]:
    return {}
