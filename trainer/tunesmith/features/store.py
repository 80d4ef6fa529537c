"""The features of one table on disk, in shards of which each is there whole or not at all.

A shard is rows of like length, a file per field, written beside its place and moved there. Whoever takes the lock of a
shard computes it: the ranks of a machine, or of several that share the folder, divide the work without a collective,
and a run that was killed goes on where it stopped."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import filelock
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.errors import MachineError
from tunesmith.features.fields import Field
from tunesmith.tracking.text import size

SHARD_ROWS = 1024
SHARD_BYTES = 256 * 2**20

Compute = Callable[[Sequence[int]], dict[str, Tensor]]
"""Rows of the table → what is stored of them: for each field [units of all rows, *inner], on the CPU."""


class FeatureStore:
    """`lengths`: tokens of each row of the table. A row's number here is its place in the order of lengths."""

    def __init__(self, folder: Path, lengths: NDArray[np.int64], fields: Sequence[Field]) -> None:
        self.folder = folder
        self.fields = tuple(fields)
        self.order = np.argsort(lengths, kind="stable")
        sorted_lengths = lengths[self.order]
        per_row = np.full(len(lengths), sum(f.unit_bytes for f in fields if f.taken != "every"))
        per_row += sorted_lengths * sum(f.unit_bytes for f in fields if f.taken == "every")
        self._bytes = np.concatenate([[0], np.cumsum(per_row)])
        self._tokens = np.concatenate([[0], np.cumsum(sorted_lengths)])
        self.edges = self._cut()
        self._maps: dict[tuple[int, str], Tensor] = {}

    def __len__(self) -> int:
        return len(self.order)

    def _cut(self) -> NDArray[np.int64]:
        """The first rows of the shards, and the end."""
        edges = [0]
        while edges[-1] < len(self.order):
            start = edges[-1]
            fits = int(np.searchsorted(self._bytes, self._bytes[start] + SHARD_BYTES, "right")) - 1
            edges.append(min(max(fits, start + 1), start + SHARD_ROWS, len(self.order)))
        return np.asarray(edges)

    @property
    def bytes(self) -> int:
        return int(self._bytes[-1])

    def rows_of(self, shard: int) -> NDArray[np.int64]:
        """The table's rows in a shard."""
        return self.order[self.edges[shard] : self.edges[shard + 1]]

    def _first(self, field: Field, row: int) -> int:
        """The place of a row's first unit among those of all rows."""
        return int(self._tokens[row]) if field.taken == "every" else row

    def _units(self, field: Field, shard: int) -> int:
        return self._first(field, int(self.edges[shard + 1])) - self._first(field, int(self.edges[shard]))

    def _path(self, shard: int, field: Field) -> Path:
        return self.folder / f"{shard:05}.{field.name}"

    def _whole(self, shard: int) -> bool:
        def there(field: Field) -> bool:
            path = self._path(shard, field)
            return path.is_file() and path.stat().st_size == self._units(field, shard) * field.unit_bytes

        return all(there(field) for field in self.fields)

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        return [shard for shard in range(len(self.edges) - 1) if not self._whole(shard)]

    def check_room(self) -> None:
        """Raises MachineError where the disk has no room for what is missing."""
        needed = sum(int(self._bytes[self.edges[s + 1]] - self._bytes[self.edges[s]]) for s in self.missing())
        free = shutil.disk_usage(self.folder.parent).free
        if needed > free:
            raise MachineError(
                f"trainable.cache_features: the features of {len(self):,} rows need {size(needed)}, but "
                f"{self.folder.parent} has {size(free)} free: set data.cache_dir to another disk, lower "
                "data.max_length, or set cache_features: false"
            )

    def fill(self, compute: Compute, per_batch: int, share: float) -> Iterator[int]:
        """Computes what is missing, one item per batch of rows that this process computed, and waits for what others
        compute. `share`: where among the shards this process begins (0 to 1)."""
        shards = self.missing()
        turn = int(len(shards) * share)
        # first what nobody is at; then what others were at, and did not finish
        for wait in (False, True):
            for shard in shards[turn:] + shards[:turn]:
                if self._whole(shard):
                    continue
                lock = filelock.FileLock(self.folder / f"{shard:05}.lock")
                try:
                    lock.acquire(blocking=wait)
                except filelock.Timeout:
                    continue
                try:
                    if not self._whole(shard):
                        yield from self._write(shard, compute, per_batch)
                finally:
                    lock.release()

    def _write(self, shard: int, compute: Compute, per_batch: int) -> Iterator[int]:
        paths = [self._path(shard, field) for field in self.fields]
        partial = [path.with_name(f"{path.name}.partial") for path in paths]
        rows = self.rows_of(shard)
        files = [path.open("wb") for path in partial]
        try:
            for start in range(0, len(rows), per_batch):
                batch = [int(row) for row in rows[start : start + per_batch]]
                found = compute(batch)
                for field, file in zip(self.fields, files, strict=True):
                    value = found[field.name].contiguous()
                    assert value.dtype == field.dtype, (field, value.dtype)
                    value.reshape(-1).view(torch.uint8).numpy().tofile(file)
                yield len(batch)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise MachineError(
                f"trainable.cache_features: the disk of {self.folder.parent} is full: {error}"
            ) from None
        finally:
            for file in files:
                file.close()
        for source, target in zip(partial, paths, strict=True):
            source.replace(target)

    def row(self, number: int) -> dict[str, Tensor]:
        """What is stored of a row, [units, *inner] per field, mapped: read when it is used."""
        shard = int(np.searchsorted(self.edges, number, "right")) - 1
        found: dict[str, Tensor] = {}
        for field in self.fields:
            base = self._first(field, int(self.edges[shard]))
            values = self._mapped(shard, field)
            found[field.name] = values[
                self._first(field, number) - base : self._first(field, number + 1) - base
            ]
        return found

    def _mapped(self, shard: int, field: Field) -> Tensor:
        key = (shard, field.name)
        if key not in self._maps:
            # copy-on-write, for torch warns of memory that cannot be written to; nobody writes
            raw = np.memmap(self._path(shard, field), dtype=np.uint8, mode="c")
            self._maps[key] = torch.from_numpy(raw).view(field.dtype).view(-1, *field.inner)
        return self._maps[key]
