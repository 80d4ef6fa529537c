"""Losses of labels and numbers, unit by unit: what a term sums, and divides by the number of units alone.

Weights never change what a unit is: the divisor is the number of rows or tokens, not the sum of their weights (which
torch's mean of a weighted cross-entropy divides by). `auto` weights average 1 over the training labels, so that they
leave the size of the loss, and of its gradient, as it was."""

from __future__ import annotations

from tunesmith.losses.strategy import build

__all__ = ["build"]
