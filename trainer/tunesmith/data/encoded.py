"""What becomes of an example once it is tokenised."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is left out of the training, and why; counted in the start-up report."""

    reason: str
