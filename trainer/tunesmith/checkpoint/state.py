"""Where a run stands: what is saved beside weights and optimizer state. The data position is the step itself, for
the order of the rows is a pure function of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(slots=True)
class Progress:
    """All ranks hold equal values. `samples` and `tokens` count what was consumed until the last logged step."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    best_value: float | None = None
    best_step: int | None = None
    stopping_value: float | None = None
    bad_evaluations: int = 0
    overflows: int = 0
    overflows_in_a_row: int = 0

    def state(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_state(state: dict[str, Any]) -> Progress:
        names = {item.name for item in fields(Progress)}
        return Progress(**{name: value for name, value in state.items() if name in names})
