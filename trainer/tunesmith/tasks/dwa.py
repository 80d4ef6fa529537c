"""Dynamic weight average (Liu et al. 2019, eq. 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, isnan, nan
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tunesmith.parts import StepPart
from tunesmith.tasks.objective import TaskObjective, TaskTerm
from tunesmith.tasks.stream import TaskStream
from tunesmith.terms import Term

if TYPE_CHECKING:
    from tunesmith.data.stream import Stream
    from tunesmith.engine import Engine


def factors(last: Sequence[float], before: Sequence[float], temperature: float) -> list[float]:
    """λ_t = K·exp(w_t/T) / Σ exp(w_i/T), w_t = L_t(i−1) / L_t(i−2), over K tasks: they sum to K. A task whose loss is
    not known for both intervals (NaN) or was 0 counts as one that stands still: w_t = 1."""
    pairs = list(zip(last, before, strict=True))
    quotients = [1.0 if isnan(now) or isnan(then) or then == 0 else now / then for now, then in pairs]
    largest = max(quotients)
    powers = [exp((quotient - largest) / temperature) for quotient in quotients]
    return [len(powers) * power / sum(powers) for power in powers]


class DynamicWeightAverage(StepPart):
    """L_t of an interval of `every` steps is the mean of the task's loss (its terms by their own weights) over the
    steps that had rows of it. In the first two intervals every factor is 1."""

    name = "dwa"

    def __init__(
        self, objective: TaskObjective, trained: Sequence[str], temperature: float, every: int
    ) -> None:
        self.objective = objective
        self.tasks = list(trained)
        self.temperature = temperature
        self.every = every
        self.past: list[list[float]] = []  # of the last two intervals, the older first
        self.factors = [1.0] * len(self.tasks)
        self.steps = [0] * len(self.tasks)  # of this interval, that had rows of it
        self.sums: Tensor  # fp64 [tasks]: of its losses in them
        self.mixed: Tensor
        self.stream: TaskStream

    def weights(self, step: int, terms: Sequence[Term]) -> Mapping[str, float]:
        by_task = dict(zip(self.tasks, self.factors, strict=True))
        return {t.name: by_task[t.task] for t in terms if isinstance(t, TaskTerm) and t.task in by_task}

    def begin(self, engine: Engine, stream: Stream) -> None:
        self.stream = cast(TaskStream, stream)
        own = [cast(TaskTerm, term) for term in self.objective.terms]
        mixed = [[term.inner.weight * (term.task == task) for term in own] for task in self.tasks]
        self.mixed = torch.tensor(mixed, dtype=torch.float64, device=engine.device)  # [tasks, terms]
        self.sums = torch.zeros(len(self.tasks), dtype=torch.float64, device=engine.device)

    def observe(self, step: int, losses: Tensor) -> None:
        there = {task for task, _ in self.stream.schedule.at(step)}
        for place, task in enumerate(self.tasks):
            if task in there:
                self.sums[place] += self.mixed[place] @ losses[: self.mixed.shape[1]]
                self.steps[place] += 1
        if (step + 1) % self.every == 0:
            pairs = zip(self.sums.tolist(), self.steps, strict=True)
            self.past = [*self.past[-1:], [total / count if count else nan for total, count in pairs]]
            self.sums.zero_()
            self.steps = [0] * len(self.tasks)
            if len(self.past) == 2:
                self.factors = factors(self.past[1], self.past[0], self.temperature)

    def state(self) -> dict[str, Any]:
        return {
            "past": self.past,
            "factors": self.factors,
            "sums": self.sums.tolist(),
            "steps": list(self.steps),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.past, self.factors, self.steps = (
            list(state["past"]),
            list(state["factors"]),
            list(state["steps"]),
        )
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
