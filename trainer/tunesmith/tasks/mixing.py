"""Which task a step trains: a pure function of the step, and of when a task stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tunesmith.recipe.tasks import (
    AnnealedMixing,
    Mixing,
    ProportionalMixing,
    RoundRobinMixing,
    TemperatureMixing,
    TogetherMixing,
)

Shares = Callable[[int], NDArray[np.float64]]
"""Step → every task's share of the windows: [tasks], above 0; they need not sum to 1."""


def shares(mixing: Mixing, windows: Sequence[int], total_steps: int) -> Shares | None:
    """The shares that `mixing` gives tasks of so many `windows` each per epoch of their own; None where every window
    has rows of every task."""
    sizes = np.asarray(windows, dtype=np.float64)
    match mixing:
        case TogetherMixing():
            return None
        case ProportionalMixing():
            return lambda step: sizes
        case TemperatureMixing(temperature=temperature):
            return lambda step: sizes ** (1.0 / temperature)
        case RoundRobinMixing():
            return lambda step: np.ones_like(sizes)
        case AnnealedMixing(start=start, end=end):
            last = max(1, total_steps - 1)
            return lambda step: sizes ** (start + (end - start) * min(1.0, step / last))


@dataclass(slots=True)
class Schedule:
    """Step → the tasks of its window, and how many windows each of them had before.

    A window of one task goes to the task that is furthest behind its share: the number of windows that a task has had
    stays within one of the sum of its shares, whatever these are, and an epoch's worth of constant shares in whole
    numbers is exact. Nothing is drawn at random. `shares` None: every window has rows of all tasks.
    """

    names: Sequence[str]
    shares: Shares | None
    stopped: dict[str, int] = field(default_factory=dict[str, int])
    """Task → the first step (0-based) from which it is drawn no more."""
    _tasks: list[int] = field(default_factory=list[int])
    _before: list[int] = field(default_factory=list[int])
    _owed: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    _had: list[int] = field(default_factory=list[int])

    def at(self, step: int) -> list[tuple[str, int]]:
        """(task, its windows before) of each task in the window of `step`, in the order of the recipe."""
        if self.shares is None:
            return [(name, step) for name in self.names if self.draws(name, step)]
        self._extend(step)
        return [(self.names[self._tasks[step]], self._before[step])]

    def draws(self, name: str, step: int) -> bool:
        return step < self.stopped.get(name, step + 1)

    def stop(self, name: str, step: int) -> None:
        """Before `step` and every step after it are asked for again."""
        assert name not in self.stopped
        self.load({**self.stopped, name: step})

    def load(self, stopped: Mapping[str, int]) -> None:
        self.stopped = dict(stopped)
        self._tasks.clear()
        self._before.clear()

    @property
    def ended(self) -> bool:
        """Whether every task has stopped."""
        return len(self.stopped) == len(self.names)

    def _extend(self, step: int) -> None:
        assert self.shares is not None
        if not self._tasks:
            self._owed, self._had = np.zeros(len(self.names)), [0] * len(self.names)
        for at in range(len(self._tasks), step + 1):
            drawn = np.array([self.draws(name, at) for name in self.names])
            share = np.where(drawn, self.shares(at), 0.0)
            self._owed += share / share.sum()
            # to the last digits equal claims are equal: the first of them
            task = int(np.argmax(np.where(drawn, np.round(self._owed, 9), -np.inf)))
            self._owed[task] -= 1.0
            self._tasks.append(task)
            self._before.append(self._had[task])
            self._had[task] += 1
