"""The ranks that runs without a fault of a process share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.numerics.rank_pool import Pools


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the processes of a test have: with more, sums have other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    made = Pools()
    yield made
    made.stop()
