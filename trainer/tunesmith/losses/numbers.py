"""Losses of numbers, averaged over the numbers of a row. predictions and labels [rows, targets]; → [rows]."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AbsoluteError:
    """|z − y|."""

    def __call__(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return (logits - labels).abs().mean(dim=-1)


@dataclass(frozen=True, slots=True)
class Huber:
    """½(z − y)² where |z − y| ≤ delta, else delta · (|z − y| − ½ delta) (Huber 1964)."""

    delta: float = 1.0

    def __call__(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return F.huber_loss(logits, labels, delta=self.delta, reduction="none").mean(dim=-1)
