"""Fixtures that every test folder shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the real data sets; the test is skipped, visibly, where there is none."""
    folder = os.environ.get("TUNESMITH_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TUNESMITH_DATA does not point at the real data sets")
    return Path(folder).resolve()
