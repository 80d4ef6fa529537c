"""The objectives of several tasks as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import Example
from tunesmith.data.table import Encoded, Table
from tunesmith.errors import UserError
from tunesmith.objectives.base import Objective
from tunesmith.recipe.tasks import TaskEvaluation
from tunesmith.tasks.datasets import JointTable
from tunesmith.terms import Term

MEAN = "tasks_mean"
"""The metric over all tasks: the mean of the one of each that tells how good it is."""


@dataclass(frozen=True, slots=True)
class TaskTerm:
    """A term of one task: of another task's batch it has no units, and is 0 without a gradient. `alone`: the task's
    only one, which has its name."""

    task: str
    inner: Term
    task_weight: float
    alone: bool

    @property
    def name(self) -> str:
        return self.task if self.alone else f"{self.task}/{self.inner.name}"

    @property
    def weight(self) -> float:
        return self.task_weight * self.inner.weight

    def units(self, batch: Batch) -> int:
        return self.inner.units(batch) if batch.task == self.task else 0

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        if batch.task != self.task:
            return normalizer.new_zeros(())
        return self.inner(outputs, batch, normalizer)


@dataclass(frozen=True, slots=True)
class Task:
    """`weight` is of its loss: 0 for one that is evaluated only. `metric`: what tells how good it is, and whether
    greater is better."""

    name: str
    objective: Objective
    weight: float
    evaluation: TaskEvaluation

    @property
    def trained(self) -> bool:
        return self.weight > 0

    @property
    def metric(self) -> tuple[str, bool]:
        name, greater = self.objective.default_metric
        if (asked := self.evaluation.metric_for_best) is not None:
            name, greater = asked.removeprefix("eval_"), greater_is_better(asked)
        if self.evaluation.greater_is_better is not None:
            greater = self.evaluation.greater_is_better
        chosen = self.evaluation.metrics
        if chosen is not None and name not in {"loss", *chosen}:
            raise UserError(
                f"tasks.{self.name}.evaluation.metrics: lacks {name}, which chooses the best: add it"
            )
        return name, greater


_SMALLER = ("loss", "perplexity", "mse", "rmse", "mae", "brier", "ece")


def greater_is_better(metric: str) -> bool:
    """Of a metric, under a task's name or its own."""
    return not metric.endswith(tuple(f"_{name}" for name in _SMALLER)) and metric not in _SMALLER


class TaskObjective(Objective):
    """`parts`: by name, in the order of the recipe. What belongs to one task is asked of `of(name)`."""

    def __init__(self, parts: Mapping[str, Task]) -> None:
        self.parts = dict(parts)
        for name, part in self.parts.items():
            part.objective.task = name

    def of(self, task: str) -> Objective:
        return self.parts[task].objective

    @property
    def terms(self) -> tuple[Term, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(
            TaskTerm(name, term, part.weight, len(part.objective.terms) == 1)
            for name, part in self.parts.items()
            for term in part.objective.terms
        )

    def terms_of(self, task: str) -> list[int]:
        """The places of its terms among all."""
        places, at = dict[str, list[int]](), 0
        for name, part in self.parts.items():
            places[name] = list(range(at, at + len(part.objective.terms)))
            at += len(part.objective.terms)
        return places[task]

    def state(self) -> dict[str, Any]:
        return {name: part.objective.state() for name, part in self.parts.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.objective.load_state(state[name])

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {name: part.objective.fingerprint for name, part in self.parts.items()}

    def notes(self) -> list[str]:
        return [f"{name}: {note}" for name, part in self.parts.items() for note in part.objective.notes()]

    def outputs(self, model: nn.Module, batch: Batch, **options: Any) -> Mapping[str, Any]:
        return self.of(batch.task).outputs(cast(Any, model).of(batch.task), batch, **options)

    def predict(self, outputs: Mapping[str, Any], batch: Batch) -> list[Any]:
        return self.of(batch.task).predict(outputs, batch)

    @property
    def default_metric(self) -> tuple[str, bool]:
        """The mean over the tasks, where all of their metrics go the same way, else the loss."""
        directions = {part.metric[1] for part in self.parts.values() if part.trained}
        return (MEAN, directions.pop()) if len(directions) == 1 else ("loss", False)

    def baseline(self, tables: Mapping[str, Table]) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for name, part in self.parts.items():
            joint = {split: cast(JointTable, table) for split, table in tables.items()}
            own = {split: table.parts[name] for split, table in joint.items() if name in table.parts}
            if "train" not in own:
                continue
            for split, values in part.objective.baseline(own).items():
                found.setdefault(split, {}).update({f"{name}_{key}": value for key, value in values.items()})
        return found

    # what only one task has

    @property
    def auto_class(self) -> Any:
        raise AssertionError("several tasks have several heads")

    def encode(self, example: Example) -> Iterator[Encoded | Dropped]:
        raise AssertionError("an example belongs to one task")

    def collate(self, rows: Sequence[Encoded], places: Sequence[int]) -> Batch:
        raise AssertionError("a batch belongs to one task")
