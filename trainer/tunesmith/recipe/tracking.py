"""`tracking`: what is logged, and where."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunesmith.recipe.base import Positive, Section


class Wandb(Section):
    """Weights & Biases. An outage never stops the run."""

    mode: Literal["online", "offline", "disabled"] = "disabled"
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = Field(default_factory=list[str])


class Tracking(Section):
    """`logging_steps` is in optimizer steps. `progress`: `auto` is a bar on a terminal, lines elsewhere.
    `compare_with`: the folder of another run, whose figures report.html shows beside this one's."""

    logging_steps: Positive = 10
    progress: Literal["auto", "bar", "lines", "off"] = "auto"
    compare_with: str | None = None
    wandb: Wandb = Field(default_factory=Wandb)
