"""`trainable`: which parameters move."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.recipe.base import Section


class Trainable(Section):
    """Empty: every parameter is trained. `freeze` and `unfreeze` are shell patterns on parameter names,
    applied in that order. Adapters, heads and layer-wise rates have their place here; this version takes
    only their empty values."""

    freeze: list[str] = Field(default_factory=list[str])
    unfreeze: list[str] = Field(default_factory=list[str])
    adapters: Annotated[list[str], Field(max_length=0)] = Field(default_factory=list[str])
    head: None = None
    layer_lr_decay: None = None
