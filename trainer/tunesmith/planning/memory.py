"""The peak of one device, in closed form: what each strategy holds all the time, what it needs at each moment of a
step, and the largest sum of both.

The moments are those of a `Profile` (forward and backward of every layer, the head, the embedding) and the
optimizer's step. What a strategy holds and gathers follows its source: each formula names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from tunesmith.planning.activations import Part, Profile
from tunesmith.planning.workload import Unit, Workload
from tunesmith.recipe.parallel import Parallel

# our norm keeps a sum for every 512 elements, in fp32, again side by side, and in fp64 (tunesmith.gradients); on an
# accelerator the sums are one per tensor
_NORM_BYTES_PER_ELEMENT = 16 / 512


@dataclass(frozen=True, slots=True)
class Setup:
    """How a workload is run. `parallel` is a strategy, not auto; `bucket`: elements of DeepSpeed's buckets."""

    parallel: Parallel
    world_size: int
    rows: int
    checkpointing: bool
    device: str = "cuda"
    bucket: int = 50_000_000

    def accumulation(self, workload: Workload) -> int:
        """Micro-steps of an optimizer step."""
        return max(1, -(-workload.rows_per_step // (self.rows * self.world_size)))


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Bytes on one device at the peak. `gather`: parameters that are whole only for the moment; `buffers`: of the
    communication. `moment` says when the peak is."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0
    gather: float = 0.0
    moment: str = ""

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in PARTS)

    @property
    def dominating(self) -> str:
        """The largest part."""
        return max(PARTS, key=lambda part: getattr(self, part))


PARTS = tuple(field.name for field in fields(Breakdown) if field.name != "moment")


@dataclass(frozen=True, slots=True)
class Place:
    """A part of the expanded profile at a micro-batch. `table` [events, 5] has live bytes relative to its beginning,
    where `level` bytes of activations are there already."""

    part: Part
    layer: int
    level: float
    table: NDArray[np.float64]

    @property
    def is_layer(self) -> bool:
        return self.layer >= 0

    @property
    def gradients(self) -> float:
        """Bytes of parameter gradients that are finished here, in the dtype of the backward."""
        return float(self.table[-1, 1])

    @property
    def moment(self) -> str:
        if self.is_layer:
            return f"{self.part.phase} of layer {self.layer}"
        return {"forward": "head and loss", "backward": "backward of the embedding"}.get(
            self.part.phase, "step"
        )

    def before_gradients(self) -> Place | None:
        """The part of it that comes before its first parameter gradient, if any does."""
        count = int((self.table[:, 1] == 0).sum())
        return replace(self, table=self.table[:count]) if count else None

    def from_gradients(self) -> Place:
        """The part from its first parameter gradient on; the whole where it has none."""
        rest = self.table[self.table[:, 1] > 0]
        return replace(self, table=rest) if len(rest) else self

    def peak(self, *, keeps_gradients: bool, base: Breakdown) -> Breakdown:
        """The largest event, on top of `base`; `keeps_gradients`: those finished within this part stay."""
        live = self.level + self.table[:, 0]
        kept = self.table[:, 1] if keeps_gradients else np.zeros(len(live))
        at = int((live + kept).argmax())
        logits = float(min(self.table[at, 2], live[at]))
        return replace(
            base,
            activations=base.activations + float(live[at]) - logits,
            logits=logits,
            gradients=base.gradients + float(kept[at]),
            moment=self.moment,
        )


def places(profile: Profile, rows: int) -> list[Place]:
    """The expanded profile at a micro-batch."""
    tables: dict[int, NDArray[np.float64]] = {}
    found: list[Place] = []
    level = 0.0
    for part, layer in profile.expanded():
        if id(part) not in tables:
            table = part.at(rows)
            table[:, 0] -= table[0, 0]
            tables[id(part)] = table
        found.append(Place(part, layer, level, tables[id(part)]))
        level += part.kept(rows)
    return found


def largest(candidates: Iterator[Breakdown]) -> Breakdown:
    return max(candidates, key=lambda one: one.total)


def estimate(workload: Workload, setup: Setup, profile: Profile) -> Breakdown:
    """The peak of a device that runs `setup`; `profile` was traced with its checkpointing and arithmetic."""
    from tunesmith.planning import sharded, whole, zero
    from tunesmith.recipe.parallel import DDP, FSDP2, Single, Zero1, Zero2, Zero3

    found = places(profile, setup.rows * workload.beside.views)
    match setup.parallel:
        case Single() | DDP():
            peak = largest(whole.moments(workload, setup, found))
        case FSDP2():
            peak = largest(sharded.moments(workload, setup, found))
        case Zero1() | Zero2() | Zero3():
            peak = largest(zero.moments(workload, setup, found))
        case _:
            raise AssertionError("auto is no strategy yet")
    return replace(peak, weights=peak.weights + workload.beside.on_one(setup.world_size))


def norm_bytes(setup: Setup, elements: float) -> float:
    """Of the sums that our gradient norm keeps for a moment."""
    return elements * _NORM_BYTES_PER_ELEMENT if setup.device == "cpu" else 0.0


def unit_of(workload: Workload, place: Place) -> Unit:
    return workload.layers[place.part.stack][place.layer]
