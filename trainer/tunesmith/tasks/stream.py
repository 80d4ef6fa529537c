"""The training rows of several tasks in their order: which task a window is of, then that task's own stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import ceil

import numpy as np

from tunesmith.batch import Batch
from tunesmith.data.order import Order, Rows
from tunesmith.data.stream import Position, Stream
from tunesmith.tasks.datasets import TaskDataset
from tunesmith.tasks.mixing import Schedule
from tunesmith.tasks.objective import TaskObjective


class TaskStream(Stream):
    """The interface of a Stream over the `streams` of the tasks that are trained. Rows have their numbers in the joint
    data set. Every micro-step is of one task, the same on every rank.

    An epoch is as many steps as it takes to have as many rows as the tasks have per epoch together, or that of the task
    `epoch`, which is in every window. A task has epochs of its own: its n-th window here is its n-th one alone."""

    def __init__(
        self,
        dataset: TaskDataset,
        streams: Mapping[str, Stream],
        objective: TaskObjective,
        schedule: Schedule,
        epoch: str | None = None,
    ) -> None:
        first = next(iter(streams.values()))
        order = Order(dataset.segments, first.order.window_rows, first.order.seed)
        super().__init__(dataset, order, objective, first.per_device, None)
        self.streams = dict(streams)
        self.schedule = schedule
        self.epoch = epoch
        self.joint = dataset.joint
        self.facts = {
            f"{name}/{key}": fact for name, one in streams.items() for key, fact in one.facts.items()
        }

    @property
    def each(self) -> Mapping[str, Stream]:
        return self.streams

    @cached_property
    def steps_per_epoch(self) -> int:
        if self.epoch is not None:
            return self.streams[self.epoch].steps_per_epoch
        if self.schedule.shares is not None:
            return sum(stream.steps_per_epoch for stream in self.streams.values())
        orders = [stream.order for stream in self.streams.values()]
        return ceil(sum(o.rows_per_epoch for o in orders) / sum(o.window_rows for o in orders))

    def position(self, step: int) -> Position:
        """The step in place of an epoch: `batch` takes it, and knows from it the epoch of each task."""
        return Position(step, 0)

    def window(self, step: int) -> Rows:
        return np.concatenate(
            [self.streams[task].window(own) + self.joint.start(task) for task, own in self.schedule.at(step)]
        )

    def cells(self, step: int, world_size: int) -> list[list[list[list[int]]]]:
        found: list[list[list[list[int]]]] = []
        for task, own in self.schedule.at(step):
            start = self.joint.start(task)
            found += [
                [[[start + row for row in sequence] for sequence in cell] for cell in ranks]
                for ranks in self.streams[task].cells(own, world_size)
            ]
        return found

    def batch(self, cell: Sequence[Sequence[int]], epoch: int, fallback: int) -> Batch:
        task, instead = self.joint.find(cell[0][0] if cell else fallback)
        stream, start = self.streams[task], self.joint.start(task)
        own = dict(self.schedule.at(epoch)).get(task, 0)
        rows = [[row - start for row in sequence] for sequence in cell]
        return stream.batch(rows, stream.position(own).epoch, instead)

    def stop(self, task: str, step: int) -> None:
        """Draws no more rows of the task from `step` on."""
        self.schedule.stop(task, step)
        self._forget()

    def load_stopped(self, stopped: Mapping[str, int]) -> None:
        self.schedule.load(stopped)
        self._forget()

    def _forget(self) -> None:
        if self._ahead is not None:
            self._ahead[1].result()  # what was made for the step ahead is of the old schedule
            self._ahead = None

    def _make(self, step: int, rank: int, world_size: int) -> list[Batch]:
        return [
            batch
            for task, own in self.schedule.at(step)
            for batch in self.streams[task].batches(own, rank, world_size, prefetch=False)
        ]
