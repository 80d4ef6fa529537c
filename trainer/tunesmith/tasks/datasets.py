"""The rows of several tasks as one data set: each row has a number of its own over all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.order import Segment
from tunesmith.data.prepare import Dataset
from tunesmith.data.table import Encoded, Table
from tunesmith.errors import Place


class JointTable:
    """Stands for a `Table`; the rows of `parts` behind one another."""

    def __init__(self, parts: Mapping[str, Table]) -> None:
        self.parts = dict(parts)
        self.names = list(self.parts)
        self._starts = np.cumsum([0, *(len(table) for table in self.parts.values())])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def start(self, task: str) -> int:
        """The number of its first row."""
        return int(self._starts[self.names.index(task)])

    def find(self, row: int) -> tuple[str, int]:
        """The task of a row, and the row's number there."""
        at = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.names[at], row - int(self._starts[at])

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return np.concatenate([table.lengths() for table in self.parts.values()])

    def lengths(self) -> NDArray[np.int64]:
        return self._lengths

    def row(self, row: int) -> Encoded:
        task, own = self.find(row)
        return self.parts[task].row(own)

    def value(self, name: str, row: int) -> Any:
        task, own = self.find(row)
        return self.parts[task].value(name, own)


@dataclass(frozen=True, slots=True)
class TaskDataset(Dataset):
    """A split of several tasks; `parts` has those that have it."""

    parts: Mapping[str, Dataset] = field(default_factory=dict[str, Dataset])

    @staticmethod
    def join(name: str, parts: Mapping[str, Dataset]) -> TaskDataset:
        table = JointTable({task: dataset.table for task, dataset in parts.items()})
        segments = tuple(
            Segment(table.start(task) + one.start, table.start(task) + one.stop, one.weight)
            for task, dataset in parts.items()
            for one in dataset.segments
        )
        return TaskDataset(name=name, table=cast(Table, table), segments=segments, parts=dict(parts))

    @property
    def joint(self) -> JointTable:
        return cast(JointTable, self.table)

    def place(self, row: int) -> Place:
        task, own = self.joint.find(row)
        return self.parts[task].place(own)

    @property
    def facts(self) -> dict[str, Any]:
        return {task: dataset.facts for task, dataset in self.parts.items()}


def joined(by_task: Mapping[str, Mapping[str, Dataset]]) -> dict[str, Dataset]:
    """Task → split → its rows, as split → the rows of all tasks that have it."""
    splits = dict.fromkeys(split for own in by_task.values() for split in own)
    return {
        split: TaskDataset.join(split, {task: own[split] for task, own in by_task.items() if split in own})
        for split in splits
    }
