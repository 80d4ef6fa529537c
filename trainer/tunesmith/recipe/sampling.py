"""`data.sampling`: how often the rows of each label are drawn in an epoch, told apart by `type`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.recipe.base import Section

AtLeastOne = Annotated[float, Field(ge=1.0)]


class Balanced(Section):
    """Every label equally often; an epoch keeps its number of rows."""

    type: Literal["balanced"]


class SquareRoot(Section):
    """Each label in proportion to √(its rows), which is `temperature` 2; an epoch keeps its number of rows."""

    type: Literal["square_root"]


class Temperature(Section):
    """Each label in proportion to (its rows)^(1/temperature): 1 is the data's own shares, larger ones come nearer to
    `balanced`; an epoch keeps its number of rows."""

    type: Literal["temperature"]
    temperature: AtLeastOne = 5.0


class Oversample(Section):
    """Rows of labels with fewer than `ratio` × the most frequent label's are drawn so often that they are as many; an
    epoch grows."""

    type: Literal["oversample"]
    ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0


class Undersample(Section):
    """Of labels with more than `ratio` × the rarest label's rows so many are drawn, others in each epoch, every row
    once before any twice; an epoch shrinks."""

    type: Literal["undersample"]
    ratio: AtLeastOne = 1.0


Sampling = Annotated[
    Balanced | SquareRoot | Temperature | Oversample | Undersample, Field(discriminator="type")
]
