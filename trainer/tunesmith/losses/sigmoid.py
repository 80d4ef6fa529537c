"""Losses of every label by itself, yes or no, averaged over the labels of a unit."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tunesmith.losses.softmax import Numbers, like, modulated


def indicators(logits: Tensor, labels: Tensor) -> Tensor:
    """[units, classes], of classes or of what is one already."""
    return labels if labels.dim() == 2 else F.one_hot(labels, logits.shape[-1]).to(logits.dtype)


def averaged(losses: Tensor, target: Tensor, weights: Numbers | None, exclusive: bool) -> Tensor:
    """Over the labels: [units, classes] → [units]. `weights` weigh a unit by its label (`exclusive`: it has one), or
    each label's part."""
    if weights is None:
        return losses.mean(dim=-1)
    each = like(weights, losses)
    return losses.mean(dim=-1) * (target @ each) if exclusive else (losses * each).mean(dim=-1)


@dataclass(frozen=True, slots=True)
class BinaryCrossEntropy:
    """−mean over labels of v · t · log σ(z) + (1 − t) · log(1 − σ(z)), v the weight of a yes. `label_smoothing` ε
    makes t (1 − ε) · t + ε / 2. logits [units, classes]; labels [units] int64 (one against the rest) or [units,
    classes]; → [units]."""

    positive_weights: Numbers | None = None
    weights: Numbers | None = None
    label_smoothing: float = 0.0
    exclusive: bool = False

    def __call__(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        target = indicators(logits, labels)
        losses = F.binary_cross_entropy_with_logits(
            logits,
            target * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing,
            pos_weight=None if self.positive_weights is None else like(self.positive_weights, logits),
            reduction="none",
        )
        return averaged(losses, target, self.weights, self.exclusive)


@dataclass(frozen=True, slots=True)
class SigmoidFocal:
    """Mean over labels of α_t · (1 − p_t)^gamma · −log p_t (Lin et al. 2017, equation 5); α_t is alpha at a yes and
    1 − alpha at a no. logits [units, classes]; labels [units] int64 or [units, classes] of 0 and 1; → [units]."""

    gamma: float = 2.0
    alpha: Numbers | None = None
    weights: Numbers | None = None
    exclusive: bool = False

    def __call__(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        target = indicators(logits, labels)
        losses = modulated(F.binary_cross_entropy_with_logits(logits, target, reduction="none"), self.gamma)
        if self.alpha is not None:
            alpha = like(self.alpha, logits)
            losses = losses * (alpha * target + (1.0 - alpha) * (1.0 - target))
        return averaged(losses, target, self.weights, self.exclusive)
