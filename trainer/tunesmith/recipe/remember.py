"""`remember`: what keeps a model from losing what it could do before."""

from __future__ import annotations

from typing import Literal

from tunesmith.recipe.base import PositiveFloat, Section


class L2SP(Section):
    """Li et al. 2018: `weight` × ½Σ(w − w₀)², w₀ the weights that the run begins with."""

    type: Literal["l2_sp"]
    weight: PositiveFloat = 0.01


Remember = L2SP
