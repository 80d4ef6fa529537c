"""Dice, token by token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tunesmith.losses.sigmoid import indicators


@dataclass(frozen=True, slots=True)
class Dice:
    """Mean over classes of 1 − (2·q·y + smooth) / (q + y + smooth), q = (1 − p)^gamma · p of the softmax's p, y the
    one-hot label (Li et al. 2020, equation 12; their alpha is `gamma` here). logits [units, classes]; labels [units]
    int64; → [units].

    The form over a whole set (2·Σqy + s) / (Σq + Σy + s), which is closer to F1, is a ratio of sums: it is no sum
    over units, and would change with the size of a micro-batch. The loss of the label's own class is least at p =
    1 / (1 + gamma), beyond which q falls again."""

    smooth: float = 1.0
    gamma: float = 0.01

    def __call__(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        p, y = logits.softmax(dim=-1), indicators(logits, labels)
        # where p rounds to 1 the power has no gradient
        q = (1.0 - p).clamp_min(1e-12) ** self.gamma * p
        return (1.0 - (2.0 * q * y + self.smooth) / (q + y + self.smooth)).mean(dim=-1)
