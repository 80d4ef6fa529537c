"""`checkpoint`: when the state is saved, how many are kept, which one becomes `final/`."""

from __future__ import annotations

from typing import Literal

from tunesmith.recipe.base import Positive, Section


class Checkpoint(Section):
    """`save_steps: null` saves at the end and on a signal only. `final: best` exports the weights of the best
    evaluation, `last` those of the last step."""

    save_steps: Positive | Literal["epoch"] | None = None
    save_total_limit: Positive | None = 2
    final: Literal["best", "last"] = "best"
