"""`averaging`: an average of the weights, kept while they are trained, told apart by `type`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.recipe.base import Positive, PositiveFloat, Section
from tunesmith.recipe.moments import Moment


class _Averaging(Section):
    """`evaluate`: which weights the evaluations of the training see; `final`: which ones `final/` has, and the `test`
    rows see. Before the average has begun both are the current ones."""

    evaluate: Literal["averaged", "current"] = "averaged"
    final: Literal["averaged", "current"] = "averaged"


class EMA(_Averaging):
    """Every `update_every` optimizer steps, average ← decay × average + (1 − decay) × weights, from the initial
    weights, or those at `start`, on. `warmup`: the t-th update (from 0) takes min(decay, (1 + t) / (10 + t)), so that
    the initial weights are soon forgotten."""

    type: Literal["ema"] = "ema"
    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    warmup: bool = True
    update_every: Positive = 1
    start: Moment | None = None


class SWA(_Averaging):
    """The mean of the weights after every `every` optimizer steps, or every epoch, from `start` on (Izmailov et al.
    2018). `learning_rate`: a constant one from `start` on, in place of the schedule's."""

    type: Literal["swa"]
    start: Moment = 0.75
    every: Positive | Literal["epoch"] = 1
    learning_rate: PositiveFloat | None = None


Averaging = Annotated[EMA | SWA, Field(discriminator="type")]
