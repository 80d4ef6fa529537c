"""The learning rate over the optimizer steps: a pure function of the step, so that resuming needs no state.

Steps count from 0. Where a decay is defined by transformers' schedulers the same formula is used, so that
curves can be compared: progress is (step - warmup) / (total - warmup), and the end value would be reached at
step = total, one after the last. The warm-up differs on purpose: theirs gives the first step a learning rate
of 0, which wastes a batch. Ours is (step + 1) / (warmup + 1) of the schedule's first value, so that the first
step after the warm-up is the first with all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from tunesmith.errors import UserError
from tunesmith.recipe.schedule import (
    WSD,
    Constant,
    Cosine,
    CosineWithRestarts,
    Cyclic,
    Exponential,
    Linear,
    OneCycle,
    Polynomial,
    ReduceOnPlateau,
    Schedule,
    Step,
)

_Bounded = Linear | Cosine | CosineWithRestarts | Polynomial | OneCycle | WSD


def warmup_steps(settings: Schedule, total_steps: int | None) -> int:
    """The number of warm-up steps. A `warmup_ratio` is taken as the decimal that the recipe states and
    rounded up: 0.07 of 100 steps are 7, not the 8 of binary floats.

    Raises UserError where a ratio meets an unknown `total_steps`, or where the warm-up is longer than the
    run.
    """
    if isinstance(settings, OneCycle):
        return 0
    if settings.warmup_ratio is not None:
        if total_steps is None:
            raise UserError(
                "schedule.warmup_ratio: the number of steps is not known: set training.max_steps, "
                "or schedule.warmup_steps instead"
            )
        return _share(settings.warmup_ratio, total_steps)
    warmup = settings.warmup_steps or 0
    if total_steps is not None and warmup > total_steps:
        raise UserError(
            f"schedule.warmup_steps: the run ends after {total_steps} steps, inside a warm-up of {warmup}: "
            "lower it, or set schedule.warmup_ratio instead"
        )
    return warmup


def multiplier(settings: Schedule, step: int, total_steps: int | None) -> float:
    """The factor on the base learning rate for the optimizer step `step` (the first is 0) of `total_steps`;
    past the end, the end's value. Reduce-on-plateau has only its warm-up here; its cuts are `Plateau.factor`.

    Raises UserError where the schedule needs a `total_steps` that is not known, or does not fit into it.
    """
    assert step >= 0, step
    warmup = warmup_steps(settings, total_steps)
    if step < warmup:
        return _after_warmup(settings, 0, warmup, total_steps) * (step + 1) / (warmup + 1)
    return _after_warmup(settings, step - warmup, warmup, total_steps)


def _after_warmup(settings: Schedule, position: int, warmup: int, total: int | None) -> float:
    """The factor `position` steps after the warm-up."""
    match settings:
        case Constant() | ReduceOnPlateau():
            return 1.0
        case Exponential():
            return settings.gamma**position
        case Step():
            return settings.gamma ** (position // settings.step_size)
        case Cyclic():
            phase = position % settings.cycle_steps / settings.cycle_steps
            return _from(settings.min_lr_ratio, 1.0 - abs(2.0 * phase - 1.0))
        case _:
            if total is None:
                raise UserError(
                    f"schedule.lr_scheduler_type: {settings.lr_scheduler_type} needs the number of steps, "
                    "which is not known: set training.max_steps"
                )
            return _bounded(settings, position, warmup, total)


def _bounded(settings: _Bounded, position: int, warmup: int, total: int) -> float:
    """The factor of a schedule that has an end, `position` steps after the warm-up."""
    span = max(total - warmup, 1)
    position = min(position, span)
    progress = position / span
    match settings:
        case Linear():
            return _from(settings.min_lr_ratio, 1.0 - progress)
        case Cosine():
            return _from(settings.min_lr_ratio, _half_cosine(progress))
        case CosineWithRestarts():
            # in whole numbers: a restart that falls on a step is not missed by a rounding
            within = settings.num_cycles * position % span / span if position < span else 1.0
            return _from(settings.min_lr_ratio, _half_cosine(within))
        case Polynomial():
            return _from(settings.min_lr_ratio, (1.0 - progress) ** settings.power)
        case OneCycle():
            return _one_cycle(settings, position, total)
        case WSD():
            return _wsd(settings, position, warmup, total)


def _one_cycle(settings: OneCycle, step: int, total: int) -> float:
    """The top is at `pct_start` × total - 1 and the end at the last step, total - 1, as in torch's
    OneCycleLR."""
    top = max(settings.pct_start * total - 1.0, 0.0)
    low = 1.0 / settings.div_factor
    if step < top:
        return _from(low, _half_cosine(1.0 - step / top))
    down = (step - top) / ((total - 1 - top) or 1.0)
    return _from(low / settings.final_div_factor, _half_cosine(min(down, 1.0)))


def _wsd(settings: WSD, position: int, warmup: int, total: int) -> float:
    """Stable at 1, then down over the last `decay_ratio` of all steps (rounded up)."""
    decay = _share(settings.decay_ratio, total)
    stable = total - warmup - decay
    if stable < 0:
        raise UserError(
            f"schedule: a warm-up of {warmup} steps and a decay of {decay} do not fit into {total} steps: "
            "lower schedule.decay_ratio or the warm-up"
        )
    if position < stable or decay == 0:
        return 1.0
    progress = (position - stable) / decay
    match settings.decay_type:
        case "linear":
            height = 1.0 - progress
        case "cosine":
            height = _half_cosine(progress)
        case "sqrt":  # Hägele et al. 2024
            height = 1.0 - math.sqrt(progress)
    return _from(settings.min_lr_ratio, height)


def _from(low: float, height: float) -> float:
    """`low` at height 0, 1 at height 1, both exactly."""
    return low * (1.0 - height) + height


def _half_cosine(progress: float) -> float:
    """From 1 at progress 0 down to 0 at progress 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _share(ratio: float, total: int) -> int:
    return math.ceil(Fraction(repr(ratio)) * total)


@dataclass(slots=True)
class Plateau:
    """Reduce-on-plateau's state. `factor` multiplies the learning rate besides `multiplier`; `bad` counts the
    evaluations since `best`. Every rank observes the same values."""

    settings: ReduceOnPlateau
    best: float | None = None
    bad: int = 0
    factor: float = 1.0

    def observe(self, value: float, greater_is_better: bool) -> None:
        """Takes one evaluation's metric. It is an improvement if it is better than `best` by more than
        `threshold` × |best|; a NaN or an infinity never is. When more than `patience` evaluations in a row
        are none, `factor` is cut, but not below `min_lr_ratio`, and the count starts again. torch's
        ReduceLROnPlateau does the same in its relative mode, for positive metrics."""
        if math.isfinite(value) and self._improves(value, greater_is_better):
            self.best = value
            self.bad = 0
            return
        self.bad += 1
        if self.bad > self.settings.patience:
            self.bad = 0
            # a floor above the present factor (changed on resume) must not raise it
            floor = min(self.settings.min_lr_ratio, self.factor)
            self.factor = max(self.factor * self.settings.factor, floor)

    def _improves(self, value: float, greater_is_better: bool) -> bool:
        if self.best is None:
            return True
        gain = value - self.best if greater_is_better else self.best - value
        return gain > self.settings.threshold * abs(self.best)

    def state_dict(self) -> dict[str, float | int | None]:
        """What a checkpoint keeps; the settings come from the recipe."""
        return {"best": self.best, "bad": self.bad, "factor": self.factor}

    def load_state_dict(self, state: dict[str, float | int | None]) -> None:
        """The inverse of `state_dict`."""
        best, bad, factor = state["best"], state["bad"], state["factor"]
        assert isinstance(bad, int)
        assert factor is not None
        self.best, self.bad, self.factor = best, bad, factor
