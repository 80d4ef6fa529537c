"""Early stopping, task by task: a task that does not get better is drawn no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from tunesmith.parts import StepPart
from tunesmith.recipe.evaluation import EarlyStopping
from tunesmith.tasks.stream import TaskStream

if TYPE_CHECKING:
    from tunesmith.data.stream import Stream
    from tunesmith.engine import Engine


class Stopping(StepPart):
    """`asked`: task → its early stopping and its metric, as (name, whether greater is better). What evaluations found
    is the same on every rank, and so is what follows from it."""

    name = "tasks"

    def __init__(self, asked: Mapping[str, tuple[EarlyStopping, tuple[str, bool]]]) -> None:
        self.asked = dict(asked)
        self.best: dict[str, float] = {}
        self.bad: dict[str, int] = dict.fromkeys(asked, 0)
        self.stream: TaskStream

    def begin(self, engine: Engine, stream: Stream) -> None:
        self.stream = cast(TaskStream, stream)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> Sequence[str]:
        told: list[str] = []
        for task, (settings, (metric, greater)) in self.asked.items():
            value = metrics.get(f"{task}_{metric}")
            if task in self.stream.schedule.stopped or value is None:
                continue
            better = value if greater else -value
            if task not in self.best or better > self.best[task] + settings.min_delta:
                self.best[task], self.bad[task] = better, 0
                continue
            self.bad[task] += 1
            if self.bad[task] >= settings.patience:
                self.stream.stop(task, step)
                told.append(
                    f"early stopping of {task}: no better {metric} in {settings.patience} evaluations; it is drawn no "
                    "more"
                )
        return told

    @property
    def ended(self) -> str | None:
        return "early stopping of every task" if self.stream.schedule.ended else None

    def state(self) -> dict[str, Any]:
        return {"best": dict(self.best), "bad": dict(self.bad), "stopped": dict(self.stream.schedule.stopped)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.best, self.bad = dict(state["best"]), dict(state["bad"])
        self.stream.load_stopped(state["stopped"])
