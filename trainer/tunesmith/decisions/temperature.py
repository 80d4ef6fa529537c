"""Temperature scaling (Guo et al. 2017, On Calibration of Modern Neural Networks): one number T that divides all
logits, the minimiser of the negative log-likelihood of held-out rows. It changes no row's most probable label."""

from __future__ import annotations

from math import exp, log

import numpy as np
from numpy.typing import NDArray

from tunesmith.decisions import Floats, sigmoid

LEAST, MOST = 0.01, 100.0


def fit_temperature(logits: Floats, truth: NDArray[np.float64], *, exclusive: bool) -> float | None:
    """T > 0; None where the likelihood grows without end, as it does where every row is right with any confidence (or
    wrong). `logits`: [rows, labels]; `truth`: the same, 1 at a row's label (or labels).

    With β = 1/T the likelihood is concave in β, and its derivative Σ z (y − p(β)) falls: its root by bisection."""

    def slope(temperature: float) -> float:
        scaled = logits / temperature
        if exclusive:
            powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
            p = powers / powers.sum(axis=1, keepdims=True)
        else:
            p = sigmoid(scaled)
        return float((logits * (truth - p)).sum())

    if slope(LEAST) >= 0.0 or slope(MOST) <= 0.0:
        return None
    low, high = log(LEAST), log(MOST)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(exp(middle)) < 0.0 else (low, middle)
    return exp((low + high) / 2)
