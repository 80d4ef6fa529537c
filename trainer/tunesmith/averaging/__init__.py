"""Averages of the weights, kept while they are trained (`averaging`)."""

from __future__ import annotations

from tunesmith.averaging.average import Average
from tunesmith.averaging.build import build_average, state_bytes

__all__ = ["Average", "build_average", "state_bytes"]
