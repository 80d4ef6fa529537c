"""Fixtures of tests that need several machines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.distributed.nodes import Nodes, UnavailableError


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    """Two hosts on this machine, or as many as `@pytest.mark.parametrize("nodes", [3], indirect=True)` says. The
    test is skipped, visibly, where they cannot be made."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(Nodes(getattr(request, "param", 2)))
        except UnavailableError as reason:
            pytest.skip(f"no hosts out of namespaces: {reason}")
        yield made
