"""The shards on disk: whole or absent, computed once, by whoever comes."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith.errors import MachineError
from tunesmith.features import store as module
from tunesmith.features.fields import Field
from tunesmith.features.store import FeatureStore

LENGTHS = np.array([5, 2, 7, 1, 3, 3, 6, 2, 4, 1])
FIELDS = (
    Field("states", "every", (3,), torch.float32),
    Field("pooled", "row", (2,), torch.bfloat16),
)


def states(row: int) -> Tensor:
    return torch.full((int(LENGTHS[row]), 3), float(row)) + torch.arange(LENGTHS[row])[:, None] / 16


def compute(rows: Sequence[int]) -> dict[str, Tensor]:
    return {
        "states": torch.cat([states(row) for row in rows]),
        "pooled": torch.tensor([[row, -row] for row in rows]).bfloat16(),
    }


def open_store(folder: Path) -> FeatureStore:
    """Four shards: of 3, 3, 3 and 1 rows."""
    folder.mkdir(parents=True, exist_ok=True)
    module.SHARD_ROWS = 3
    return FeatureStore(folder, LENGTHS, FIELDS)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", 3)


def check(store: FeatureStore) -> None:
    """Every row has its own features."""
    assert store.missing() == []
    for number, row in enumerate(store.order):
        found = store.row(number)
        assert torch.equal(found["states"], states(int(row)))
        assert found["pooled"].tolist() == [[row, -row]]
        assert found["pooled"].dtype == torch.bfloat16


def test_rows_come_back(tmp_path: Path) -> None:
    store = open_store(tmp_path / "features")
    assert sum(store.fill(compute, 2, 0.0)) == len(LENGTHS)
    check(store)
    assert store.bytes == sum(
        path.stat().st_size for path in store.folder.iterdir() if path.suffix != ".lock"
    )
    assert sum(open_store(store.folder).fill(compute, 2, 0.0)) == 0


def test_a_shard_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 50)
    store = FeatureStore(tmp_path, LENGTHS, FIELDS)
    sizes = np.diff(store.edges)
    assert sizes.sum() == len(LENGTHS)
    assert list(sizes) == [2, 1, 1, 1, 1, 1, 1, 1, 1], "two rows of one token, then one at a time"
    assert sum(store.fill(compute, 2, 0.0)) == len(LENGTHS)
    check(store)


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.unit.test_features_store import compute, open_store

batches = 0
def dies(rows):
    global batches
    batches += 1
    if batches == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(rows)

for _ in open_store(Path({folder!r})).fill(dies, 2, 0.0):
    pass
"""


def test_a_kill_leaves_whole_shards_only(tmp_path: Path) -> None:
    folder = tmp_path / "features"
    script = KILLED.format(root=str(Path(__file__).parents[2]), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    store = open_store(folder)
    assert list(folder.glob("*.partial")), "it was killed while it wrote"
    assert store.missing() == [1, 2, 3], "batches 3 and 4 are the second shard's"
    assert sum(store.fill(compute, 2, 0.0)) == 7
    check(store)
    assert not list(folder.glob("*.partial"))


def test_a_shard_that_is_cut_short_is_computed_again(tmp_path: Path) -> None:
    store = open_store(tmp_path / "features")
    list(store.fill(compute, 2, 0.0))
    path = store.folder / "00002.states"
    path.write_bytes(path.read_bytes()[:-4])
    again = open_store(store.folder)
    assert again.missing() == [2]
    assert sum(again.fill(compute, 2, 0.0)) == 3
    check(again)


def test_two_processes_divide_the_shards(tmp_path: Path) -> None:
    """One is in the midst of a shard; the other computes the rest, and waits for it."""
    one, two = open_store(tmp_path / "features"), open_store(tmp_path / "features")
    first = iter(one.fill(compute, 2, 0.0))
    assert next(first) == 2, "it holds the first shard"
    done, rest = 0, threading.Event()

    def counts(rows: Sequence[int]) -> dict[str, Tensor]:
        nonlocal done
        done += len(rows)
        if done == 7:
            rest.set()
        return compute(rows)

    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(lambda: sum(two.fill(counts, 2, 0.5)))
        assert rest.wait(60), "it computes all but the first shard"
        assert sum(first) == 1, "the rest of its shard; the others are done"
        assert second.result(60) == 7
    check(two)


def test_a_shard_that_its_process_left_is_taken_over(tmp_path: Path) -> None:
    def breaks(rows: Sequence[int]) -> dict[str, Tensor]:
        raise ZeroDivisionError

    store = open_store(tmp_path / "features")
    with pytest.raises(ZeroDivisionError):
        list(store.fill(breaks, 2, 0.0))
    assert sum(open_store(store.folder).fill(compute, 2, 0.5)) == len(LENGTHS)
    check(store)


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path / "features")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(1000, 600, store.bytes - 1))
    with pytest.raises(
        MachineError, match=r"features of 10 rows need 448 B, but .* has 447 B free: set data\.c"
    ):
        store.check_room()
    list(store.fill(compute, 2, 0.0))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(1000, 1000, 0))
    open_store(store.folder).check_room()  # nothing is missing


def test_a_disk_that_fills_up_is_the_machines_fault(tmp_path: Path) -> None:
    def full(rows: Sequence[int]) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(MachineError, match=r"the disk of .* is full"):
        list(open_store(tmp_path / "features").fill(full, 2, 0.0))
