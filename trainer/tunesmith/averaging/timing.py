"""After which optimizer steps an average is updated, and how much the current weights count in it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tunesmith.recipe.averaging import EMA, SWA
from tunesmith.recipe.moments import step_of


@dataclass(frozen=True, slots=True)
class Timing:
    """A pure function of the number of steps that are done, so that a resumed run needs no state for it. `start`: the
    steps after which the average begins; `every`: from one update to the next; `aligned`: whether updates are counted
    from 0 (epochs), not from `start`."""

    start: int
    every: int
    aligned: bool = False

    @classmethod
    def of(cls, settings: EMA | SWA, total_steps: int, steps_per_epoch: int) -> Timing:
        start = 0 if settings.start is None else step_of(settings.start, total_steps, steps_per_epoch)
        every = settings.update_every if isinstance(settings, EMA) else settings.every
        if every == "epoch":
            return cls(start, steps_per_epoch, aligned=True)
        return cls(start, every)

    def falls(self, done: int) -> bool:
        """Whether the weights after `done` steps are among those that are averaged; `start` is, unless it lies within
        an epoch that counts as a whole."""
        since = done if self.aligned else done - self.start
        return done >= self.start and since % self.every == 0

    def times(self, total_steps: int) -> int:
        """How often it falls in a run, before the first step included."""
        return sum(self.falls(done) for done in range(total_steps + 1))

    def number(self, done: int) -> int:
        """Of the update after `done` steps, from 0, where the average began as the weights at `start`."""
        return (done - self.start) // self.every - 1


def decay_at(settings: EMA, number: int) -> float:
    """d_t = min(decay, (1 + t) / (10 + t)), t = `number`, as TensorFlow's ExponentialMovingAverage has it with
    `num_updates`; without `warmup` the decay."""
    return min(settings.decay, (1 + number) / (10 + number)) if settings.warmup else settings.decay


def initial_share(settings: EMA, updates: int) -> float:
    """What the weights that an EMA began with still count in it after so many updates: Π d_t."""
    return prod(decay_at(settings, number) for number in range(updates))
