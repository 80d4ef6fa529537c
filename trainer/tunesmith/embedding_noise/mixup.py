"""Mixup of embedded rows (Zhang et al. 2018, "mixup"; Guo et al. 2019, "Augmenting Data with Mixup for Sentence
Classification", wordMixup):

    e = λ eᵢ + (1 − λ) eⱼ,    loss = λ ℓ(z, yᵢ) + (1 − λ) ℓ(z, yⱼ),    λ ~ Beta(α, α)

for the logits z of e; where the shorter text has ended, its e is zero, and both are attended to. The row j, which is
any row of the training, and λ come with the row i, a pure function of (seed, epoch, i). For cross-entropy it is the
loss of the mixed label. A unit stays a row. Positions and segments are the row's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.data.augment.pairs import PARTNER, SHARE
from tunesmith.terms import Term


def mix(embedded: Tensor, batch: Batch, module: nn.Module) -> Tensor:
    """λ × the row's + (1 − λ) × its partner's embeddings: [rows, positions, width]."""
    if SHARE not in batch.targets:
        return embedded
    # a filler's are blank: −100 and 0
    ids, theirs = (
        batch.targets[f"{PARTNER}/{name}"].clamp(min=0) for name in ("input_ids", "attention_mask")
    )
    own = batch.targets[f"{PARTNER}/own_mask"].clamp(min=0)
    share = batch.targets[SHARE].to(embedded.dtype)[:, None, None]
    other: Tensor = module(ids)
    # a row that is not mixed stays what it is, its padding too
    mixed = share * embedded * own[:, :, None] + (1.0 - share) * other * theirs[:, :, None]
    return torch.where(share == 1.0, embedded, mixed)


@dataclass(frozen=True, slots=True)
class MixedTerm:
    """λ × a term's loss of the row's own labels + (1 − λ) × that of its partner's, row by row."""

    term: Term

    @property
    def name(self) -> str:
        return self.term.name

    @property
    def weight(self) -> float:
        return self.term.weight

    def units(self, batch: Batch) -> int:
        return self.term.units(batch)

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        if SHARE not in batch.targets:
            return self.term(outputs, batch, normalizer)
        theirs = {
            name: batch.targets[f"{PARTNER}/{name}"]
            for name in batch.targets
            if f"{PARTNER}/{name}" in batch.targets
        }
        share = batch.targets[SHARE]
        own = row_losses(self.term, outputs, batch)
        other = row_losses(self.term, outputs, replace(batch, targets=batch.targets | theirs))
        return (share * own + (1.0 - share) * other).sum() / normalizer


def row_losses(term: Term, outputs: Mapping[str, Any], batch: Batch) -> Tensor:
    """What each row adds to a term that sums over rows: fp32 [rows]. Any such term: it is asked row by row."""
    rows = len(batch.rows)
    one = torch.ones((), device=next(iter(batch.inputs.values())).device)

    def cut(values: Mapping[str, Any], i: int) -> dict[str, Any]:
        found = {name: value for name, value in values.items() if isinstance(value, Tensor) and value.ndim}
        return {name: value[i : i + 1] for name, value in found.items() if len(value) == rows}

    return torch.stack(
        [
            term(
                cut(outputs, i),
                replace(
                    batch,
                    inputs=cut(batch.inputs, i),
                    targets=cut(batch.targets, i),
                    rows=batch.rows[i : i + 1],
                    draws=None,
                ),
                one,
            )
            for i in range(rows)
        ]
    )
