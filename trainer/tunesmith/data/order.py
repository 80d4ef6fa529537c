"""The order of the rows: a pure function of (seed, epoch, position), whatever the world size.

An epoch's rows are shuffled and cut into windows; a window is the rows of one optimizer step. A window is then
dealt to ranks × micro-steps (`deal`). Nothing here holds state, so a run resumes at step N by asking for step N.

Random numbers are raw Philox outputs (Salmon et al. 2011), which NumPy keeps stable over its versions; its
`shuffle` and `permutation` it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from math import ceil
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

_MEGA = 50  # windows that are sorted by length together: like lengths, and still 50 windows' worth of mixing


class Salt(IntEnum):
    """Keeps the streams of random numbers apart that share seed and epoch."""

    ROWS = 1
    WINDOWS = 2
    SOURCE = 3
    ROW = 4
    SPLIT = 5
    MODEL = 6
    ROW_MODEL = 7
    TRANSFORM = 8
    SAMPLING = 9
    CURRICULUM = 10
    ROLLOUT = 11


def raw(n: int, *key: int) -> NDArray[np.uint64]:
    """`n` random 64-bit numbers, a pure function of the key (non-negative integers)."""
    return np.asarray(np.random.Philox(np.random.SeedSequence(key)).random_raw(n), dtype=np.uint64)


def shuffled(rows: Rows, *key: int) -> Rows:
    """The rows in an order drawn uniformly by the key (ties of 64-bit numbers aside)."""
    return rows[np.argsort(raw(len(rows), *key), kind="stable")]


def evenly(rows: Rows, count: int, epoch: int, *key: int) -> Rows:
    """`count` of the rows for one epoch: whole copies of all first, then the fraction that is left: a different part
    each epoch, every row once before any twice, because epochs walk round one circle of the rows, shuffled by the
    key."""
    whole, n = divmod(count, max(1, len(rows)))
    if n == 0:
        return np.tile(rows, whole)
    # one circle for all laps: drawn anew for each lap, it would put rows twice into an epoch that ends a lap
    circle = shuffled(rows, *key)
    part = circle[(epoch * n + np.arange(n)) % len(rows)]
    return np.concatenate([np.tile(rows, whole), part])


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows [start, stop) of one source, each drawn `weight` times per epoch."""

    start: int
    stop: int
    weight: float = 1.0

    def per_epoch(self) -> int:
        return round((self.stop - self.start) * self.weight)

    def draw(self, seed: int, epoch: int) -> Rows:
        rows = np.arange(self.start, self.stop, dtype=np.int64)
        return evenly(rows, self.per_epoch(), epoch, seed, 0, Salt.SOURCE, self.start)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Rows that lie anywhere, `count` of them drawn per epoch. No row is in two groups."""

    rows: Rows
    count: int

    def per_epoch(self) -> int:
        return self.count

    def draw(self, seed: int, epoch: int) -> Rows:
        return evenly(self.rows, self.count, epoch, seed, 0, Salt.SAMPLING, int(self.rows[0]))


class Selection(Protocol):
    """What cuts the windows where they are no plain shuffle: the steps below `ends`, and those behind them in the
    same epoch."""

    @property
    def ends(self) -> int: ...

    def windows(self, rows: Rows, first_step: int, window_rows: int, key: tuple[int, ...]) -> list[Rows]:
        """As many windows, of the same sizes, as a shuffle of an epoch's `rows` would be cut into."""
        ...


@dataclass(frozen=True, slots=True)
class Order:
    """The windows of every epoch. `lengths` (tokens per row) is given where rows of like length share a window."""

    segments: tuple[Segment | Group, ...]
    window_rows: int
    seed: int
    shuffle: bool = True
    lengths: NDArray[np.int64] | None = None
    selection: Selection | None = None

    @property
    def rows_per_epoch(self) -> int:
        return sum(segment.per_epoch() for segment in self.segments)

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self.rows_per_epoch / self.window_rows)

    def epoch(self, epoch: int) -> list[Rows]:
        """The windows of one epoch; the last one cut is short where the rows do not divide."""
        rows = np.concatenate([segment.draw(self.seed, epoch) for segment in self.segments])
        first = epoch * self.steps_per_epoch
        if self.selection is not None and first < self.selection.ends:
            key = (self.seed, epoch, Salt.CURRICULUM)
            return self.selection.windows(rows, first, self.window_rows, key)
        if self.shuffle:
            rows = shuffled(rows, self.seed, epoch, Salt.ROWS)
        if self.lengths is not None:
            mega = _MEGA * self.window_rows
            blocks = [rows[i : i + mega] for i in range(0, len(rows), mega)]
            rows = np.concatenate([block[np.argsort(self.lengths[block], kind="stable")] for block in blocks])
        windows = [rows[i : i + self.window_rows] for i in range(0, len(rows), self.window_rows)]
        if self.lengths is not None and self.shuffle:
            places = shuffled(np.arange(len(windows), dtype=np.int64), self.seed, epoch, Salt.WINDOWS)
            windows = [windows[i] for i in places]
        return windows


def deal(items: Sequence[int] | Rows, world_size: int, per_device: int) -> list[list[list[int]]]:
    """Deals a window's items to micro-steps × ranks: `cells[micro_step][rank]` are the items of one forward.

    As few micro-steps as `per_device` allows, and cells as even as it goes: sizes differ by one at most, and
    a cell without items (where there are fewer items than ranks) is a filler. Neighbours in `items` stay
    together, so items sorted by length give batches of like length."""
    micro_steps = max(1, ceil(len(items) / (world_size * per_device)))
    cells = micro_steps * world_size
    edges = [len(items) * i // cells for i in range(cells + 1)]
    dealt = [[int(item) for item in items[a:b]] for a, b in pairwise(edges)]
    return [dealt[i : i + world_size] for i in range(0, cells, world_size)]
