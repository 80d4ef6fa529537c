"""Step number → this rank's batches, without state: the same rows for a step at any world size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from tunesmith.batch import Batch
from tunesmith.data.curriculum import Limits
from tunesmith.data.order import Order, Rows, Salt, deal, raw
from tunesmith.data.packing import first_fit
from tunesmith.data.prepare import Dataset
from tunesmith.data.table import Encoded
from tunesmith.objectives import Objective


@dataclass(frozen=True, slots=True)
class Position:
    """Where a step stands: its epoch and its window in the epoch (both from 0)."""

    epoch: int
    window: int


Drawn = tuple[int, int]
"""A row, and which copy of it in its epoch."""


class Transform(Protocol):
    """What becomes of an encoded training row before the objective draws from it: a pure function of the row and
    the key (seed, epoch, row, Salt.TRANSFORM), which ends in the number of the copy for a row that comes again in an
    epoch. Where rows are packed it must not make a row longer."""

    def __call__(self, row: Encoded, key: tuple[int, ...]) -> Encoded: ...


class Stream:
    """The training rows in their order, each passed through the `transforms`. With `pack_length`, a window's rows
    are packed into sequences of at most that many tokens, and micro-batches count sequences. `limits` may cut rows of
    early steps. `facts` are for the start-up report.

    A row that comes several times in an epoch is transformed, masked and dropped out otherwise each time: its keys
    end in the number of the copy, where that is not 0."""

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        objective: Objective,
        per_device: int,
        pack_length: int | None,
        transforms: Sequence[Transform] = (),
        limits: Limits | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.objective = objective
        self.per_device = per_device
        self.pack_length = pack_length
        self.transforms = tuple(transforms)
        self.limits = limits
        self.facts = dict(facts or {})
        self._epoch: tuple[int, list[Rows], list[Rows]] | None = None
        self._ahead: tuple[tuple[int, int, int], Future[list[Batch]]] | None = None

    @property
    def each(self) -> Mapping[str, Stream]:
        """The streams of the tasks, by name; itself, under no name, where there is one."""
        return {"": self}

    @cached_property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    @cached_property
    def _lengths(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return self.dataset.table.lengths()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="tunesmith-batches")

    def position(self, step: int) -> Position:
        return Position(*divmod(step, self.steps_per_epoch))

    def window(self, step: int) -> Rows:
        """The rows of an optimizer step, over all ranks."""
        return self._window(step)[0]

    def _window(self, step: int) -> tuple[Rows, Rows]:
        """The rows of a step, and which copy of it in its epoch each is (from 0)."""
        at = self.position(step)
        if self._epoch is None or self._epoch[0] != at.epoch:
            windows = self.order.epoch(at.epoch)
            self._epoch = (at.epoch, windows, _copies(windows))
        return self._epoch[1][at.window], self._epoch[2][at.window]

    def cells(self, step: int, world_size: int) -> list[list[list[list[int]]]]:
        """`cells[micro_step][rank]`: the sequences of one forward, each a list of rows (one, unless packed)."""
        return [
            [[[row for row, _ in sequence] for sequence in cell] for cell in ranks]
            for ranks in self._dealt(step, world_size)
        ]

    def _dealt(self, step: int, world_size: int) -> list[list[list[list[Drawn]]]]:
        window, copies = self._window(step)
        lengths = np.minimum(self._lengths[window], self._cut(step) or np.iinfo(np.int64).max)
        longest_first = np.argsort(-lengths, kind="stable")
        drawn: list[Drawn] = list(zip(window.tolist(), copies.tolist(), strict=True))
        if self.pack_length is None:
            sequences = [[drawn[i]] for i in longest_first]
        else:
            bins = first_fit([(int(i), int(lengths[i])) for i in longest_first], self.pack_length)
            sequences = [[drawn[i] for i in places] for places in bins]
        dealt = deal(range(len(sequences)), world_size, self.per_device)
        return [[[sequences[i] for i in cell] for cell in ranks] for ranks in dealt]

    def _cut(self, step: int) -> int | None:
        """The tokens that a row is cut to at a step."""
        cuts = self.limits is not None and self.limits.cut and step < self.limits.ends
        return self.limits.at(step) if self.limits is not None and cuts else None

    def batch(self, cell: Sequence[Sequence[int]], epoch: int, fallback: int) -> Batch:
        """The tensors of one forward; a cell without rows becomes a filler shaped by the row `fallback`."""
        return self._batch([[(row, 0) for row in sequence] for sequence in cell], epoch, fallback, None)

    def _batch(self, cell: Sequence[Sequence[Drawn]], epoch: int, fallback: int, cut: int | None) -> Batch:
        if not cell:
            return self._batch([[(fallback, 0)]], epoch, fallback, cut).as_filler()
        keys = [self._key(epoch, sequence[0], Salt.ROW_MODEL) for sequence in cell]
        draws = torch.tensor([int(raw(1, *key)[0] >> np.uint64(1)) for key in keys])
        groups = [[self._row(drawn, epoch, cut) for drawn in sequence] for sequence in cell]
        rows = [[row for row, _ in sequence] for sequence in cell]
        if self.pack_length is not None:
            made = self.objective.collate_packed(groups, rows)
        else:
            made = self.objective.collate([group[0] for group in groups], [sequence[0] for sequence in rows])
        return replace(made, draws=draws, task=self.objective.task)

    def _row(self, drawn: Drawn, epoch: int, cut: int | None) -> Encoded:
        encoded = self.dataset.table.row(drawn[0])
        if cut is not None:
            length = len(encoded["input_ids"])
            encoded = {
                name: value[:cut] if np.ndim(value) and len(value) == length else value
                for name, value in encoded.items()
            }
        for transform in self.transforms:
            encoded = transform(encoded, self._key(epoch, drawn, Salt.TRANSFORM))
        return self.objective.draw(encoded, self._key(epoch, drawn, Salt.ROW))

    def _key(self, epoch: int, drawn: Drawn, salt: Salt) -> tuple[int, ...]:
        row, copy = drawn
        return (self.order.seed, epoch, row, salt, copy) if copy else (self.order.seed, epoch, row, salt)

    def batches(self, step: int, rank: int, world_size: int, *, prefetch: bool) -> list[Batch]:
        """This rank's batches of a step. With `prefetch` the next step's are made in a thread meanwhile."""
        key = (step, rank, world_size)
        ahead = self._ahead
        made = ahead[1].result() if ahead is not None and ahead[0] == key else self._make(*key)
        if prefetch:
            following = (step + 1, rank, world_size)
            self._ahead = (following, self._pool.submit(self._make, *following))
        return made

    def _make(self, step: int, rank: int, world_size: int) -> list[Batch]:
        epoch, fallback = self.position(step).epoch, int(self.window(step)[0])
        cut = self._cut(step)
        return [self._batch(ranks[rank], epoch, fallback, cut) for ranks in self._dealt(step, world_size)]


def _copies(windows: Sequence[Rows]) -> list[Rows]:
    """For each row of an epoch's windows how many times it came before: shaped like the windows."""
    rows = np.concatenate(windows)
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    runs = np.diff(np.concatenate([starts, [len(rows)]]))
    copies = np.empty(len(rows), dtype=np.int64)
    copies[order] = np.arange(len(rows)) - np.repeat(starts, runs)
    return np.split(copies, np.cumsum([len(window) for window in windows])[:-1])
