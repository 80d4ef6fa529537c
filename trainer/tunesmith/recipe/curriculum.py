"""`data.curriculum` and `data.max_length_schedule`: which rows come first."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.recipe.base import Positive, Section
from tunesmith.recipe.moments import Moment

StartFraction = Annotated[float, Field(gt=0.0, lt=1.0)]


class LinearPace(Section):
    """The share of the rows that may be drawn grows by equal steps, from `start_fraction` to all at `until`."""

    type: Literal["linear"]
    start_fraction: StartFraction = 0.05
    until: Moment = 0.5


class RootPace(Section):
    """As linear, of the share to the power `power`: new rows come fast at first, slower later."""

    type: Literal["root"]
    power: Annotated[float, Field(gt=1.0)] = 2.0
    start_fraction: StartFraction = 0.05
    until: Moment = 0.5


class GeometricPace(Section):
    """The share grows by equal factors: new rows come slowly at first, faster later."""

    type: Literal["geometric"]
    start_fraction: StartFraction = 0.05
    until: Moment = 0.5


Pace = Annotated[LinearPace | RootPace | GeometricPace, Field(discriminator="type")]


class _Curriculum(Section):
    direction: Literal["easy_first", "hard_first"] = "easy_first"
    pace: Pace = Field(default_factory=lambda: RootPace(type="root"))


class ByLength(_Curriculum):
    """Short rows are easy."""

    by: Literal["length"]


class ByColumn(_Curriculum):
    """`column` of the training files holds a number per row; small is easy."""

    by: Literal["column"]
    column: str


class ByLoss(_Curriculum):
    """Rows with a small loss under `reference`, the folder of a finished run with this objective, are easy."""

    by: Literal["loss"]
    reference: str


Curriculum = Annotated[ByLength | ByColumn | ByLoss, Field(discriminator="by")]


class LengthStage(Section):
    """Before `until`, rows have at most `max_length` tokens."""

    until: Moment
    max_length: Positive


class LengthSchedule(Section):
    """Shorter limits than `data.max_length` for the beginning, one after the other. Longer rows wait (`longer: wait`);
    with `cut`, which is for causal_lm, they are cut."""

    stages: list[LengthStage] = Field(min_length=1)
    longer: Literal["wait", "cut"] = "wait"
