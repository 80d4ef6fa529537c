"""Arithmetic on sets of weights, a tensor at a time. All of it takes and returns fp64.

A task vector is what a training added: τ = θ − θ₀ (Ilharco et al. 2023)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Merge = Literal["linear", "task", "ties", "dare_linear", "dare_ties"]
MERGES: tuple[Merge, ...] = ("linear", "task", "ties", "dare_linear", "dare_ties")


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w t of tensors of one shape."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.double()
    return total


def trim(vector: Tensor, density: float) -> Tensor:
    """The share `density` of the entries with the greatest magnitude, the others 0 (the first step of TIES)."""
    kept = int(density * vector.numel())
    flat = vector.double().flatten()
    found = torch.zeros_like(flat)
    places = flat.abs().topk(kept).indices
    found[places] = flat[places]
    return found.view(vector.shape)


def drop(vector: Tensor, density: float, key: Sequence[object]) -> Tensor:
    """Each entry is kept with probability `density`, and divided by it: the mean stays (DARE, Yu et al. 2024). Which
    are kept is a function of `key` alone."""
    seed = int.from_bytes(hashlib.sha256(repr(tuple(key)).encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(vector.shape, dtype=torch.float64, generator=generator) < density
    return torch.where(kept, vector.double() / density, 0.0)


def elected_mean(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The second and third step of TIES (Yadav et al. 2023): for each entry the sign of Σ τ is elected, and the mean
    taken of w τ over the vectors that have this sign there; a sum of 0 elects +."""
    total = weighted_sum(vectors, [1.0] * len(vectors))
    sign = torch.where(total >= 0, 1.0, -1.0).double()
    mixed, count = torch.zeros_like(total), torch.zeros_like(total)
    for vector, weight in zip(vectors, weights, strict=True):
        agrees = vector.double().sign() == sign
        mixed += torch.where(agrees, weight * vector.double(), 0.0)
        count += agrees
    return mixed / count.clamp(min=1.0)


def merge(
    method: Merge, vectors: Sequence[Tensor], weights: Sequence[float], density: float, key: Sequence[object]
) -> Tensor:
    """One vector of several. `key`: what DARE's random numbers are a function of, beside the vector's number."""
    match method:
        case "linear" | "task":
            return weighted_sum(vectors, weights)
        case "ties":
            return elected_mean([trim(v, density) for v in vectors], weights)
        case "dare_linear":
            return weighted_sum([drop(v, density, (*key, i)) for i, v in enumerate(vectors)], weights)
        case "dare_ties":
            return elected_mean([drop(v, density, (*key, i)) for i, v in enumerate(vectors)], weights)


def low_rank(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) with B A nearest to `product` [out, in] in the Frobenius norm (Eckart & Young
    1936)."""
    u, s, v = torch.linalg.svd(product.double(), full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def signed_roots(weight: float) -> tuple[float, float]:
    """Factors for A and for B whose product is the weight."""
    root = math.sqrt(abs(weight))
    return math.copysign(root, weight), root
