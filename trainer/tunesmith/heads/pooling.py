"""One vector of a row's tokens. Every way sees the real tokens alone, wherever the padding stands; a row without any
gives zeros, or its first place, and never NaN."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Pooling(nn.Module):
    """hidden [rows, positions, width], real [rows, positions] bool → [rows, width], in hidden's dtype. Sums are taken
    in fp32."""

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        raise NotImplementedError


class First(Pooling):
    """The first token: BERT's [CLS]."""

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        return _at(hidden, torch.where(real, positions, hidden.shape[1] - 1).amin(1))


class Last(Pooling):
    """The last token, the only one that has seen all of the row in a causal model."""

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        return _at(hidden, torch.where(real, positions, 0).amax(1))


class Mean(Pooling):
    """The mean of the tokens."""

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        total = _without_padding(hidden, real).sum(1)
        return (total / real.sum(1, keepdim=True).clamp(min=1)).to(hidden.dtype)


class Max(Pooling):
    """The maximum over the tokens, feature by feature."""

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        lowest = torch.finfo(hidden.dtype).min
        highest = hidden.masked_fill(~real.unsqueeze(-1), lowest).amax(1)
        return highest.masked_fill(~real.any(1, keepdim=True), 0.0)


class Attention(Pooling):
    """Σ_t α_t·h_t, α = softmax over the tokens of uᵀ·tanh(W·h_t + b) with W, b and u learned: Yang et al. 2016,
    "Hierarchical Attention Networks for Document Classification", equations 5 to 7."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, width)
        self.context = nn.Linear(width, 1, bias=False)  # a bias would shift all scores alike

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        scores = self.context(torch.tanh(self.projection(hidden))).squeeze(-1).float()
        weights = scores.masked_fill(~real, torch.finfo(torch.float32).min).softmax(1)
        return (weights.unsqueeze(-1) * _without_padding(hidden, real)).sum(1).to(hidden.dtype)


def build_pooling(name: str, width: int) -> Pooling:
    match name:
        case "cls":
            return First()
        case "last":
            return Last()
        case "mean":
            return Mean()
        case "max":
            return Max()
        case _:
            assert name == "attention", name
            return Attention(width)


def _at(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


def _without_padding(hidden: Tensor, real: Tensor) -> Tensor:
    # filled, not multiplied: what stands at a padded position may be anything
    return hidden.float().masked_fill(~real.unsqueeze(-1), 0.0)
