"""Fixtures that every test folder shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the real data sets; the test is skipped, visibly, where there is none."""
    folder = os.environ.get("TUNESMITH_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TUNESMITH_DATA does not point at the real data sets")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """As the processes of a test have: with more, sums have other bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pools(one_thread: None) -> Iterator[Any]:
    """Ranks that stay alive, for the runs that are about no fault of a process."""
    from tests.numerics.rank_pool import Pools

    made = Pools()
    yield made
    made.stop()
