"""`parallel`: how the run is spread over processes. The number of processes is an option of the launch."""

from __future__ import annotations

from typing import Literal

from tunesmith.recipe.base import PositiveFloat, Section


class Parallel(Section):
    """`timeout` (seconds) bounds a collective: past it the job ends instead of hanging."""

    strategy: Literal["auto", "single", "ddp"] = "auto"
    timeout: PositiveFloat = 600.0
