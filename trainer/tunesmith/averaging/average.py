"""The average of the weights while they are trained: an exponential one (EMA; Polyak & Juditsky 1992, "Acceleration
of stochastic approximation by averaging") or their mean (SWA; Izmailov et al. 2018, "Averaging Weights Leads to Wider
Optima and Better Generalization")."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.averaging.timing import Timing, decay_at
from tunesmith.parts import StepPart
from tunesmith.recipe.averaging import EMA, SWA

if TYPE_CHECKING:
    from tunesmith.data.stream import Stream
    from tunesmith.engine import Engine


class Average(StepPart):
    """An fp32 average of every parameter that the optimizer was built for, sharded like it.

    EMA: a ← a + (1 − d_t) (θ − a), begun as a = θ after `start` steps. SWA: a ← a + (θ − a) / n over the n weights
    that are averaged. Where an update was suppressed (`skip`), nothing is averaged, decided on the device.
    """

    name = "averaging"

    def __init__(self, settings: EMA | SWA, timing: Timing) -> None:
        self.settings = settings
        self.timing = timing
        self._done = 0  # optimizer steps
        self._swapped = False
        self._engine: Engine
        self._taken: Tensor  # 0-dim fp32 on the engine's device: how many weights are in SWA's mean
        self._averages: dict[str, Tensor]

    @property
    def begun(self) -> bool:
        """Whether there is an average: SWA has none before its first weights, of which all ranks know alike."""
        first = self.timing.start
        if self.timing.aligned:
            first = -(-first // self.timing.every) * self.timing.every
        return self._done >= first

    @torch.no_grad()
    def begin(self, engine: Engine, stream: Stream) -> None:
        # made at once, also where it begins late: a run that lacks the memory fails before its first step
        self._engine = engine
        self._taken = torch.zeros((), device=engine.device)
        self._averages = {s.name: s.value.to(torch.float32, copy=True) for s in engine.shards()}

    @torch.no_grad()
    def after_step(self, step: int, skip: Tensor) -> None:
        self._done = step + 1
        if not self.timing.falls(self._done):
            return
        counted = (skip == 0).float()
        if isinstance(self.settings, SWA):
            counted = torch.where(self._taken == 0, 1.0, counted)  # the first weights, whoever made them
            self._taken += counted
            weight = counted / self._taken
        elif self._done == self.timing.start:
            weight = torch.ones_like(counted)  # the same
        else:
            weight = counted * (1.0 - decay_at(self.settings, self.timing.number(self._done)))
        for shard in self._engine.shards():
            average = self._averages[shard.name]
            average.lerp_(shard.value.float(), weight.to(average.device))

    def learning_rate(self, step: int) -> float | None:
        """The constant rate that `step` (0-based) trains with, where the schedule's does not hold."""
        if isinstance(self.settings, SWA) and step >= self.timing.start:
            return self.settings.learning_rate
        return None

    @contextmanager
    def swapped(self) -> Generator[None]:
        """The average in the place of the weights, which come back bitwise; the weights themselves where there is no
        average yet. Called by all ranks, between two windows. After an exception nothing comes back: what failed on
        one rank must not wait for the others."""
        if not self.begun:
            yield
            return
        kept = self._exchange({})
        self._swapped = True
        yield
        self._exchange(kept)
        self._swapped = False

    @torch.no_grad()
    def _exchange(self, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights and averages change places; rounded weights, which an average does not fit into, are returned, and
        come back where they are given."""
        found: dict[str, Tensor] = {}
        for shard in self._engine.shards():
            average, value = self._averages[shard.name], shard.value
            if shard.name in kept:
                value.copy_(kept[shard.name])
            elif value.dtype == torch.float32:
                before = value.clone()
                value.copy_(average)
                average.copy_(before)
            else:
                found[shard.name] = value.clone()
                value.copy_(average)
        self._engine.wrote()
        return found

    @torch.no_grad()
    def settle(self) -> None:
        """Puts the average in the place of the weights for good. Called by all ranks."""
        assert self.begun
        for shard in self._engine.shards():
            shard.value.copy_(self._averages[shard.name])
        self._engine.wrote()

    def sharded_state(self) -> Mapping[str, Mapping[str, Tensor]]:
        assert not self._swapped, "the weights are where the average is looked for"
        if not self.begun:
            return {}
        return {name: {"average": average} for name, average in self._averages.items()}

    def load_sharded_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, tensors in state.items():
            self._averages[name].copy_(tensors["average"])

    def state(self) -> dict[str, Any]:
        return {"done": self._done, "taken": self._taken}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._done = state["done"]
        self._taken.copy_(state["taken"])


def average_among(parts: Iterable[StepPart]) -> Average | None:
    """The one that keeps an average of the weights, if there is one."""
    return next((part for part in parts if isinstance(part, Average)), None)
