"""Losses of labels 0 < 1 < … < K − 1 that have an order. labels [units] int64; → [units]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cumulative:
    """−1/(K − 1) · Σ_k log P(the side of threshold k on which the label lies), with P(beyond k) = Σ_{c > k} p_c of the
    softmax: the ranked logarithmic score (Tödter & Ahrens 2012). For two labels it is the cross-entropy. Monotone in k
    by construction, with a plain head: logits [units, K]."""

    def __call__(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        logs = logits.log_softmax(dim=-1)
        below = logs.logcumsumexp(dim=-1)[:, :-1]  # log P(label ≤ k), k = 0 … K − 2
        beyond = logs.flip(-1).logcumsumexp(dim=-1).flip(-1)[:, 1:]  # log P(label > k)
        return -torch.where(_beyond(labels, below.shape[-1]), beyond, below).mean(dim=-1)


@dataclass(frozen=True, slots=True)
class EarthMover:
    """Σ_k (P(label ≤ k) − [label ≤ k])² / (K − 1), P from the softmax: the squared earth mover's distance (Hou et al.
    2016), which is the ranked probability score (Epstein 1969). logits [units, K]."""

    def __call__(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        below = logits.softmax(dim=-1).cumsum(dim=-1)[:, :-1]
        target = (~_beyond(labels, below.shape[-1])).to(logits.dtype)
        return (below - target).square().mean(dim=-1)


@dataclass(frozen=True, slots=True)
class Corn:
    """Σ over k ≤ min(label, K − 2) of the binary cross-entropy of [label > k] given label ≥ k (Shi et al. 2023). By
    the chain rule it is −log P(label) of `corn_probabilities`. Their sum over a batch is divided by its number of
    (row, k) pairs; this one by its rows. logits [units, K − 1]."""

    def __call__(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        beyond = _beyond(labels, logits.shape[-1])
        losses = F.binary_cross_entropy_with_logits(logits, beyond.to(logits.dtype), reduction="none")
        asked = torch.arange(logits.shape[-1], device=logits.device) <= labels[:, None]
        return (losses * asked).sum(dim=-1)


def _beyond(labels: Tensor, thresholds: int) -> Tensor:
    """[units, thresholds]: label > k."""
    return labels[:, None] > torch.arange(thresholds, device=labels.device)


def corn_probabilities(logits: Tensor) -> Tensor:
    """P(label = j) = Π_{k < j} σ(z_k) · (1 − σ(z_j)), the last without its factor: [units, K − 1] → [units, K]."""
    beyond = F.logsigmoid(logits).cumsum(dim=-1)
    reached = F.pad(beyond, (1, 0))  # log P(label ≥ j)
    stops = F.pad(F.logsigmoid(-logits), (0, 1))  # log P(label = j | label ≥ j)
    return (reached + stops).exp()
