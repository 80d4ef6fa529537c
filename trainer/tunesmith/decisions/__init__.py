"""What is decided after training on the evaluation rows: a temperature for the probabilities, and where probabilities
become answers. Kept in objective.json, and part of every later answer and metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_TINY = float(np.finfo(np.float32).tiny)  # below it a probability in fp32 is no number to take a logarithm of


@dataclass(frozen=True, slots=True)
class Decisions:
    """`temperature` divides the logits. At most one of the others: `threshold` of two labels, the probability of label
    `positive` above which it is the answer; `thresholds` of several labels per row, the probability above which a row
    has each; `offsets` of many labels, which are added to their log-probabilities before the greatest is the answer.
    `metric`: what they were chosen for."""

    temperature: float | None = None
    threshold: float | None = None
    positive: int | None = None
    thresholds: tuple[float, ...] | None = None
    offsets: tuple[float, ...] | None = None
    metric: str | None = None

    @property
    def chooses(self) -> bool:
        """Whether answers are others than the most probable ones."""
        return self.threshold is not None or self.thresholds is not None or self.offsets is not None

    def state(self) -> dict[str, Any]:
        """As JSON, without what there is not."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None
        }

    @staticmethod
    def of(state: Mapping[str, Any]) -> Decisions:
        values: dict[str, Any] = {}
        for name, value in state.items():
            values[name] = tuple(cast(list[float], value)) if isinstance(value, list) else value
        return Decisions(**values)

    def calibrated(self, probabilities: NDArray[Any], *, exclusive: bool) -> Floats:
        """[rows, labels] → the same, at the temperature. `exclusive`: a row has one label, and its probabilities sum
        to 1; else each has a sigmoid of its own."""
        values = probabilities.astype(np.float64)
        if self.temperature is None:
            return values
        logits = log_odds(values, exclusive=exclusive) / self.temperature
        if not exclusive:
            return sigmoid(logits)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def one_label(self, calibrated: Floats) -> NDArray[np.int64]:
        """[rows, labels] → the label of each row."""
        if self.threshold is not None:
            assert self.positive is not None
            chosen = calibrated[:, self.positive] > self.threshold
            return np.where(chosen, self.positive, 1 - self.positive).astype(np.int64)
        values = calibrated if self.offsets is None else log_odds(calibrated, exclusive=True) + self.offsets
        return values.argmax(axis=1)

    def many_labels(self, calibrated: Floats) -> NDArray[np.int64]:
        """[rows, labels] → 1 where a row has a label."""
        return (calibrated > (0.5 if self.thresholds is None else np.array(self.thresholds))).astype(np.int64)


UNDECIDED = Decisions()


def sigmoid(logits: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-logits.clip(-700.0, 700.0)))  # e^710 is beyond fp64


def log_odds(probabilities: Floats, *, exclusive: bool) -> Floats:
    """Logits that give these probabilities: their logarithms, or log(p / (1 − p))."""
    if exclusive:
        return np.log(probabilities.clip(_TINY, 1.0))
    # an fp32 sigmoid rounds to 1 above 17
    p = probabilities.clip(_TINY, 1.0 - 2.0**-25)
    return np.log(p) - np.log1p(-p)
