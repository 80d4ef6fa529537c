"""Which rows may be drawn at a step: the easiest part first, and short ones first. A pure function of the step.

Competence-based curriculum learning (Platanios et al. 2019): at step t rows are drawn uniformly from the c(t) easiest
part of the training rows, where the competence c grows from c₀ to 1 at step T:

    linear     c(t) = c₀ + (1 − c₀) t / T
    root       c(t) = (c₀^p + (1 − c₀^p) t / T)^(1/p)
    geometric  c(t) = c₀^(1 − t / T)"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.order import Rows, shuffled
from tunesmith.recipe.curriculum import GeometricPace, LinearPace, RootPace


@dataclass(frozen=True, slots=True)
class Pace:
    """`until`: the step from which on all rows may be drawn."""

    settings: LinearPace | RootPace | GeometricPace
    until: int

    def competence(self, step: int) -> float:
        start = self.settings.start_fraction
        if step >= self.until:
            return 1.0
        part = step / self.until
        match self.settings:
            case LinearPace():
                return start + (1 - start) * part
            case RootPace(power=power):
                return (start**power + (1 - start**power) * part) ** (1 / power)
            case GeometricPace():
                return start ** (1 - part)


@dataclass(frozen=True, slots=True)
class Limits:
    """(until step, tokens) in their order: what a row may have at most, before `max_length` holds. `cut`: longer rows
    are cut, and none waits."""

    stages: tuple[tuple[int, int], ...]
    max_length: int
    cut: bool

    @property
    def ends(self) -> int:
        return self.stages[-1][0]

    def at(self, step: int) -> int:
        return next((tokens for until, tokens in self.stages if step < until), self.max_length)


@dataclass(frozen=True, slots=True, eq=False)
class EasyFirst:
    """A `Selection` of an order. `difficulty`: fp64 [rows of the table], small is drawn first; `lengths`: int64 [rows
    of the table].

    An epoch's rows lie on one shuffled circle, and its windows walk round it, each past the rows that may not yet be
    drawn: what a window gets is a uniform part of what may be drawn, and no row comes twice in one lap."""

    difficulty: NDArray[np.float64]
    pace: Pace | None
    lengths: NDArray[np.int64]
    limits: Limits | None

    @property
    def ends(self) -> int:
        waits = self.limits is not None and not self.limits.cut
        limit = self.limits.ends if self.limits is not None and waits else 0
        return max(limit, 0 if self.pace is None else self.pace.until)

    def windows(self, rows: Rows, first_step: int, window_rows: int, key: tuple[int, ...]) -> list[Rows]:
        circle = shuffled(rows, *key)
        found: list[Rows] = []
        at, limit, ranks, fitting = 0, -1, np.empty(0, dtype=np.int64), 0
        for number, start in enumerate(range(0, len(rows), window_rows)):
            step, size = first_step + number, min(window_rows, len(rows) - start)
            if (now := self._limit(step)) != limit:
                limit = now
                ranks, fitting = self._ranks(circle, limit, min(window_rows, len(rows)))
            competence = 1.0 if self.pace is None else self.pace.competence(step)
            # what is below a whole row by rounding alone is that row
            below = max(size, ceil(round(competence * fitting, 9)))
            window, at = _walk(circle, ranks, below, at, size)
            found.append(window)
        return found

    def _limit(self, step: int) -> int:
        return np.iinfo(np.int64).max if self.limits is None or self.limits.cut else self.limits.at(step)

    def _ranks(self, circle: Rows, limit: int, at_least: int) -> tuple[Rows, int]:
        """For each place of the circle its rank from easy to hard among the rows that fit, [places]; and how many fit.
        `at_least` so many do: the shortest."""
        lengths = self.lengths[circle]
        longest = int(np.partition(lengths, at_least - 1)[at_least - 1])
        fits = lengths <= max(limit, longest)
        order = np.lexsort((self.difficulty[circle], ~fits))
        ranks = np.empty(len(circle), dtype=np.int64)
        ranks[order] = np.arange(len(circle))
        return ranks, int(fits.sum())


def _walk(circle: Rows, ranks: Rows, below: int, at: int, size: int) -> tuple[Rows, int]:
    """The next `size` ≤ `below` rows of the circle from place `at` on whose rank is below `below`, and the place
    behind the last of them."""
    parts: list[Rows] = []
    while size:
        width = min(len(circle), size * len(circle) // below + 64)
        places = (at + np.arange(width)) % len(circle)
        hits = np.flatnonzero(ranks[places] < below)[:size]
        parts.append(circle[places[hits]])
        size -= len(hits)
        at = int(places[-1 if size else hits[-1]] + 1) % len(circle)
    return np.concatenate(parts), at
