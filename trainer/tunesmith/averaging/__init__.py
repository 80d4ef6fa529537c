"""Averages of the weights, kept while they are trained (`averaging`)."""

from __future__ import annotations

from tunesmith.averaging.average import Average, average_among
from tunesmith.averaging.build import build, build_average, state_bytes
from tunesmith.averaging.saved import put_average

__all__ = ["Average", "average_among", "build", "build_average", "put_average", "state_bytes"]
