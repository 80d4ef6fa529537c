"""Losses of the order of a list. scores and relevance [lists, longest], `there` [lists, longest] bool; → [lists].

A unit is a list; its pairs are averaged within it, so that a long list counts as one."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tunesmith.recipe.losses import Ranking


def list_losses(settings: Ranking, scores: Tensor, relevance: Tensor, there: Tensor) -> Tensor:
    match settings.method:
        case "ranknet":
            return _over_pairs(F.softplus(-_differences(scores)), relevance, there)
        case "margin":
            margin = 1.0 if settings.margin is None else settings.margin
            return _over_pairs((margin - _differences(scores)).clamp_min(0.0), relevance, there)
        case "listnet":
            return listnet(scores, relevance, there)
        case "listmle":
            return listmle(scores, relevance, there)


def _differences(scores: Tensor) -> Tensor:
    return scores[:, :, None] - scores[:, None, :]


def _over_pairs(losses: Tensor, relevance: Tensor, there: Tensor) -> Tensor:
    """The mean over the pairs (i, j) with relevance i > j: RankNet's −log σ(s_i − s_j) (Burges et al. 2005), or a
    hinge. 0 for a list without such a pair."""
    pairs = (relevance[:, :, None] > relevance[:, None, :]) & there[:, :, None] & there[:, None, :]
    total = torch.where(pairs, losses, 0.0).sum(dim=(1, 2))
    return total / pairs.sum(dim=(1, 2)).clamp_min(1)


def listnet(scores: Tensor, relevance: Tensor, there: Tensor) -> Tensor:
    """−Σ softmax(relevance) · log softmax(scores): the top-one form of Cao et al. 2007."""
    target = _hidden(relevance, there).softmax(dim=-1)
    logs = _hidden(scores, there).log_softmax(dim=-1)
    return -torch.where(there, target * logs, 0.0).sum(dim=-1)


def listmle(scores: Tensor, relevance: Tensor, there: Tensor) -> Tensor:
    """−log Π_k exp(s_π(k)) / Σ_{j ≥ k} exp(s_π(j)), π the order by falling relevance, equal ones in that of the file
    (Xia et al. 2008), divided by the length of the list."""
    order = _hidden(relevance, there).argsort(dim=-1, descending=True, stable=True)
    scores, there = _hidden(scores, there).gather(1, order), there.gather(1, order)
    rest = scores.flip(-1).logcumsumexp(dim=-1).flip(-1)
    return torch.where(there, rest - scores, 0.0).sum(dim=-1) / there.sum(dim=-1).clamp_min(1)


def _hidden(values: Tensor, there: Tensor) -> Tensor:
    """What is not there as low as can be; not −∞, whose differences have no gradient."""
    return values.masked_fill(~there, torch.finfo(values.dtype).min / 4)
