"""Step number → this rank's batches, without state: the same rows for a step at any world size."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from tunesmith.batch import Batch
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


class Transform(Protocol):
    """What becomes of an encoded training row before the objective draws from it: a pure function of the row and
    the key (seed, epoch, row, Salt.TRANSFORM). Where rows are packed it must not make a row longer."""

    def __call__(self, row: Encoded, key: tuple[int, ...]) -> Encoded: ...


class Stream:
    """The training rows in their order, each passed through the `transforms`. With `pack_length`, a window's rows
    are packed into sequences of at most that many tokens, and micro-batches count sequences."""

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        objective: Objective,
        per_device: int,
        pack_length: int | None,
        transforms: Sequence[Transform] = (),
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.objective = objective
        self.per_device = per_device
        self.pack_length = pack_length
        self.transforms = tuple(transforms)
        self._epoch: tuple[int, list[Rows]] | None = None
        self._ahead: tuple[tuple[int, int, int], Future[list[Batch]]] | None = None

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
        at = self.position(step)
        if self._epoch is None or self._epoch[0] != at.epoch:
            self._epoch = (at.epoch, self.order.epoch(at.epoch))
        return self._epoch[1][at.window]

    def cells(self, step: int, world_size: int) -> list[list[list[list[int]]]]:
        """`cells[micro_step][rank]`: the sequences of one forward, each a list of rows (one, unless packed)."""
        window = self.window(step)
        longest_first = window[np.argsort(-self._lengths[window], kind="stable")]
        if self.pack_length is None:
            sequences = [[int(row)] for row in longest_first]
        else:
            sequences = first_fit(
                [(int(row), int(self._lengths[row])) for row in longest_first], self.pack_length
            )
        dealt = deal(range(len(sequences)), world_size, self.per_device)
        return [[[sequences[i] for i in cell] for cell in ranks] for ranks in dealt]

    def batch(self, cell: Sequence[Sequence[int]], epoch: int, fallback: int) -> Batch:
        """The tensors of one forward; a cell without rows becomes a filler shaped by the row `fallback`."""
        if not cell:
            return self.batch([[fallback]], epoch, fallback).as_filler()
        seed = self.order.seed
        draws = [
            int(raw(1, seed, epoch, sequence[0], Salt.ROW_MODEL)[0] >> np.uint64(1)) for sequence in cell
        ]
        groups = [[self._row(row, epoch) for row in sequence] for sequence in cell]
        if self.pack_length is not None:
            made = self.objective.collate_packed(groups, cell)
        else:
            made = self.objective.collate([group[0] for group in groups], [sequence[0] for sequence in cell])
        return replace(made, draws=torch.tensor(draws))

    def _row(self, row: int, epoch: int) -> Encoded:
        seed, encoded = self.order.seed, self.dataset.table.row(row)
        for transform in self.transforms:
            encoded = transform(encoded, (seed, epoch, row, Salt.TRANSFORM))
        return self.objective.draw(encoded, (seed, epoch, row, Salt.ROW))

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
        return [self.batch(ranks[rank], epoch, fallback) for ranks in self.cells(step, world_size)]
