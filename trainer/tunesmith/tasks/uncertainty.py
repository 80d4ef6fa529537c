"""Uncertainty weighting (Kendall et al. 2018, eq. 7 and 10): a learnt log-variance per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.module import FACTORS, TrainModule
from tunesmith.parts import EXTRAS, ForwardPart, Strategies
from tunesmith.recipe.tasks import UncertaintyWeighting
from tunesmith.tasks.objective import TaskObjective, TaskTerm
from tunesmith.terms import RowSquaredError, Term

NAME = "uncertainty"
_HALVES = "tunesmith_log_variances"


class LogVariances(nn.Module):
    """s: fp32 [tasks], 0 at first. Its forward → (exp(−s), s/2), each [tasks] fp32."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(tasks))

    def forward(self) -> tuple[Tensor, Tensor]:
        s = self.log_variances.float()
        return torch.exp(-s), s * 0.5


@dataclass(frozen=True, slots=True)
class HalfLogVariance:
    """s/2 of a task, once for every window that has rows of it: each micro-batch adds it in proportion to its rows.
    A unit is a row of the task. `weight` is the task's."""

    task: str
    place: int
    weight: float

    @property
    def name(self) -> str:
        return f"{NAME}/{self.task}"

    def units(self, batch: Batch) -> int:
        return batch.samples if batch.task == self.task else 0

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        return outputs[_HALVES][self.place] * self.units(batch) / normalizer


class Uncertainty(ForwardPart):
    """Weight × (c·exp(−s) × loss + s/2) for every task: c is 1 for likelihoods of classes, ½ for squared errors."""

    def __init__(self, objective: TaskObjective, tasks: Sequence[str]) -> None:
        self.tasks = list(tasks)
        own = [cast(TaskTerm, term) for term in objective.terms]
        self._of = [self.tasks.index(term.task) if term.task in self.tasks else None for term in own]
        self._scale = [0.5 if isinstance(term.inner, RowSquaredError) else 1.0 for term in own]

    def modules(self, model: nn.Module) -> Mapping[str, nn.Module]:
        return {NAME: LogVariances(len(self.tasks))}

    def add(self, module: TrainModule, outputs: Mapping[str, Any], batch: Batch) -> Mapping[str, Any]:
        precisions, halves = getattr(module.model, EXTRAS)[NAME]()
        one = torch.ones((), device=halves.device)
        places = zip(self._of, self._scale, strict=True)
        factors = [one if at is None else scale * precisions[at] for at, scale in places]
        factors += [one] * (len(module.terms) - len(factors))
        return {FACTORS: torch.stack(factors), _HALVES: halves}


def build_uncertainty(
    settings: UncertaintyWeighting, objective: TaskObjective, trained: Sequence[str]
) -> tuple[Strategies, list[str]]:
    """The part and its terms; and the names in the model of the parameters that have `settings.learning_rate`."""
    terms: tuple[Term, ...] = tuple(
        HalfLogVariance(name, place, objective.parts[name].weight) for place, name in enumerate(trained)
    )
    found = Strategies(
        terms=terms,
        forward=(Uncertainty(objective, trained),),
        notes=("the logged loss is that of the tasks' own weights, beside half of each log-variance",),
    )
    return found, [f"{EXTRAS}.{NAME}.log_variances"]
