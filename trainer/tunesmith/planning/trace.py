"""A second look at one row: the whole depth of the model traced at exactly its micro-batch, instead of one layer of
each kind at two others."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.planning.choose import Row
from tunesmith.planning.inspect import Inspected
from tunesmith.planning.memory import estimate

AGREEMENT = 0.1  # two methods that differ by more widen the interval
UNCERTAINTY = 0.1  # of the closed form: its 95th percentile over the measured configurations (docs/plan.md)


@dataclass(frozen=True, slots=True)
class Check:
    """`closed` and `traced`: bytes; `low` to `high` is what to expect."""

    closed: float
    traced: float
    low: float
    high: float

    @property
    def agrees(self) -> bool:
        return abs(self.traced / self.closed - 1) <= AGREEMENT


def check(found: Inspected, row: Row) -> Check:
    """What is held and moved for communication is the strategy's closed form in both."""
    setup = row.setup
    variant = found.variant(setup.parallel, setup.checkpointing, setup.device)
    traced = estimate(
        found.workload, setup, found.traced(variant, setup.rows * found.workload.beside.views)
    ).total
    closed = row.memory.total
    low, high = min(closed, traced) * (1 - UNCERTAINTY), max(closed, traced) * (1 + UNCERTAINTY)
    return Check(closed, traced, low, high)
