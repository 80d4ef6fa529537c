"""A moment of a run, as recipes state it: a share of all steps, a step, or epochs."""

from __future__ import annotations

import re
from fractions import Fraction as Exact
from math import ceil
from typing import Annotated

from pydantic import AfterValidator, Field

_EPOCHS = re.compile(r"(\d+(?:\.\d+)?) epochs?")


def _says_epochs(text: str) -> str:
    if not (found := _EPOCHS.fullmatch(text)) or Exact(found[1]) == 0:
        raise ValueError(
            f"{text!r} is no moment: write 0.2 (of all steps), 100 (a step) or 1.5 epochs (a number above 0)"
        )
    return text


Moment = (
    Annotated[int, Field(gt=0)]
    | Annotated[float, Field(gt=0.0, lt=1.0)]
    | Annotated[str, AfterValidator(_says_epochs)]
)
"""0.2: a share of all steps; 100: optimizer steps; `1.5 epochs`."""


def step_of(moment: int | float | str, total_steps: int, steps_per_epoch: int, times: int = 1) -> int:
    """The number of optimizer steps before `times` × the moment, rounded up. Decimals are taken as they are written:
    0.07 of 100 steps are 7."""
    match moment:
        case int():
            return moment * times
        case float():
            return ceil(Exact(str(moment)) * times * total_steps)
        case str():
            found = _EPOCHS.fullmatch(moment)
            assert found is not None, moment
            return ceil(Exact(found[1]) * times * steps_per_epoch)
