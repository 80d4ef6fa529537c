"""The pools of ranks that all cells of a matrix share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.numerics.rank_pool import LivingPools


@pytest.fixture(scope="module")
def pools() -> Iterator[LivingPools]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = LivingPools()
    yield made
    made.stop()
    torch.set_num_threads(threads)
