"""Losses of one label among several, from the softmax of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tunesmith.terms import modulated

Numbers = tuple[float, ...]


@lru_cache(maxsize=64)
def constant(values: Numbers, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[values], copied to the device once."""
    return torch.tensor(values, device=device, dtype=dtype)


def like(values: Numbers, tensor: Tensor) -> Tensor:
    return constant(values, tensor.device, tensor.dtype)


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """−Σ_c w_c · t_c · log p_c with the target t, the label's one-hot or a distribution, smoothed as torch's
    `cross_entropy` smooths and weighs it (Szegedy et al. 2016). logits [units, classes]; labels [units] int64 or
    [units, classes]; → [units]."""

    weights: Numbers | None = None
    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return F.cross_entropy(
            logits,
            labels,
            weight=None if self.weights is None else like(self.weights, logits),
            label_smoothing=self.label_smoothing,
            reduction="none",
        )


@dataclass(frozen=True, slots=True)
class Focal:
    """−α_y · (1 − p_y)^gamma · log p_y (Lin et al. 2017, equation 5, with the softmax's p). logits [units, classes];
    labels [units] int64; → [units]."""

    gamma: float = 2.0
    weights: Numbers | None = None

    def __call__(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        losses = modulated(F.cross_entropy(logits, labels, reduction="none"), self.gamma)
        return losses if self.weights is None else losses * like(self.weights, logits)[labels]


@dataclass(frozen=True, slots=True)
class LDAM:
    """−w_y · log softmax(s · (z − Δ_y at y))_y (Cao et al. 2019, equation 13); `margins` are Δ. logits [units,
    classes]; labels [units] int64; → [units]."""

    margins: Numbers
    scale: float = 1.0
    weights: Numbers | None = None

    def __call__(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        lowered = F.one_hot(labels, logits.shape[-1]) * like(self.margins, logits)
        losses = F.cross_entropy(self.scale * (logits - lowered), labels, reduction="none")
        return losses if self.weights is None else losses * like(self.weights, logits)[labels]
