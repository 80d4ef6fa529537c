"""Memory under DeepSpeed ZeRO."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.planning.memory import Breakdown, Place, Setup
from tunesmith.planning.workload import Workload


def moments(workload: Workload, setup: Setup, found: list[Place]) -> Iterator[Breakdown]:
    raise NotImplementedError
