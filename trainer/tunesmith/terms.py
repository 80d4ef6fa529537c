"""Terms of the loss, and the one place where a loss is divided.

The gradient of a step is d/dθ of Σ over terms of weight × (sum over the labelled units of the global batch) /
(number of those units). A unit is a token for token losses, a row for row losses. A term therefore never takes a
mean: it sums, and divides by the normalizer that the loop hands in, which counts the whole window over all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tunesmith.batch import IGNORED, Batch
from tunesmith.fused_head import HeadOutput

_LEAST = 1e-12  # where 1 − p is 0, its power has no gradient


class Term(Protocol):
    """One addend of the loss."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    def units(self, batch: Batch) -> int:
        """The labelled units in a batch; called before the forward, summed over the window and the ranks."""
        ...

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        """The sum over the batch's units / normalizer: 0-dim fp32, with gradient."""
        ...


class UnitLoss(Protocol):
    """A loss for each of several units, none of which depends on the others."""

    def __call__(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """logits [units, outputs]; labels [units] int64, or [units, outputs]; `mask` [units] bool, false where there is
        no label (a valid one stands there, and what is returned is not read); → [units]."""
        ...


def modulated(cross_entropy: Tensor, gamma: float) -> Tensor:
    """(1 − p)^gamma · cross_entropy, p = exp(−cross_entropy) (Lin et al. 2017, equation 4)."""
    wrong = -torch.expm1(-cross_entropy)
    return wrong.clamp_min(_LEAST) ** gamma * cross_entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenTerm:
    """logits: `outputs[logits]` [rows, positions, classes], or their stand-in; labels: `targets[target]` [rows,
    positions] int64, −100 where there is no loss; `shift` for next-token prediction."""

    name: str = "loss"
    weight: float = 1.0
    target: str = "labels"
    logits: str = "logits"
    shift: bool = False

    def _labels(self, batch: Batch) -> Tensor:
        labels = batch.targets[self.target]
        return labels[:, 1:] if self._shifts(batch) else labels

    def _shifts(self, batch: Batch) -> bool:
        return self.shift and not batch.aligned

    def units(self, batch: Batch) -> int:
        return int((self._labels(batch) != IGNORED).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCrossEntropy(_TokenTerm):
    """Σ −(1 − p)^focal_gamma · log p over the labelled positions, p of the label: cross-entropy, or the focal loss
    (Lin et al. 2017). Label smoothing as torch's `cross_entropy` (Szegedy et al. 2016), not with a focus."""

    label_smoothing: float = 0.0
    focal_gamma: float = 0.0

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        logits: Tensor | HeadOutput = outputs[self.logits]
        labels, shift = self._labels(batch), self._shifts(batch)
        if isinstance(logits, HeadOutput):
            return logits.cross_entropy(
                labels,
                normalizer=normalizer,
                label_smoothing=self.label_smoothing,
                focal_gamma=self.focal_gamma,
                shift=shift,
            )
        if shift:
            logits = logits[:, :-1]
        losses = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(),
            labels.reshape(-1),
            ignore_index=IGNORED,
            label_smoothing=self.label_smoothing,
            reduction="none" if self.focal_gamma else "sum",
        )
        total = modulated(losses, self.focal_gamma).sum() if self.focal_gamma else losses
        return total / normalizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss(_TokenTerm):
    """Σ over the labelled positions of `loss`, from the logits."""

    loss: UnitLoss

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        logits, labels = outputs[self.logits], self._labels(batch)
        if self._shifts(batch):
            logits = logits[:, :-1]
        return _masked_sum(self.loss, logits.flatten(0, 1), labels.flatten()) / normalizer


def _masked_sum(loss: UnitLoss, logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Σ of the losses of the units that have a label, and that `mask` [units] bool leaves."""
    if not labels.is_floating_point():
        known = labels != IGNORED
        mask, labels = known if mask is None else known & mask, labels.clamp_min(0)
    assert mask is not None
    return torch.where(mask, loss(logits.float(), labels, mask), 0.0).sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowTerm:
    name: str = "loss"
    weight: float = 1.0

    def units(self, batch: Batch) -> int:
        return int(batch.targets["row_mask"].sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLoss(_RowTerm):
    """Σ over rows of `loss`. logits [rows, outputs]; `targets[labels]` [rows] int64, or [rows, outputs]."""

    loss: UnitLoss

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        mask = batch.targets["row_mask"] > 0
        return _masked_sum(self.loss, outputs["logits"], batch.targets["labels"], mask) / normalizer


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCrossEntropy(_RowTerm):
    """Σ over rows of −log p(label). logits [rows, classes], `targets[target]` [rows] int64, or [rows, classes]: a
    distribution, whose cross-entropy it is."""

    label_smoothing: float = 0.0
    target: str = "labels"
    logits: str = "logits"

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        logits, labels = outputs[self.logits].float(), batch.targets[self.target]
        total = F.cross_entropy(
            logits, labels, ignore_index=IGNORED, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return total / normalizer


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBinaryCrossEntropy(_RowTerm):
    """Σ over rows of the mean over labels of the binary cross-entropy. logits and labels [rows, labels]."""

    label_smoothing: float = 0.0

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        labels = batch.targets["labels"] * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
        losses = F.binary_cross_entropy_with_logits(outputs["logits"].float(), labels, reduction="none")
        return (losses.mean(dim=-1) * batch.targets["row_mask"]).sum() / normalizer


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSquaredError(_RowTerm):
    """Σ over rows of the mean over targets of the squared error. logits and labels [rows, targets]."""

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        losses = (outputs["logits"].float() - batch.targets["labels"]).square()
        return (losses.mean(dim=-1) * batch.targets["row_mask"]).sum() / normalizer


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanCrossEntropy(_RowTerm):
    """Extractive answers: Σ over rows of the mean of −log p(start) and −log p(end) (Devlin et al. 2019), p over the
    row's own positions.

    start_logits, end_logits, `inputs[attention_mask]` [rows, positions]; `targets[start]`, `targets[end]` [rows]
    int64."""

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        ends = [
            F.cross_entropy(
                _over_own_positions(outputs, batch, end),
                batch.targets[end],
                ignore_index=IGNORED,
                reduction="sum",
            )
            for end in ("start", "end")
        ]
        return torch.stack(ends).mean() / normalizer


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanLoss(_RowTerm):
    """As SpanCrossEntropy, of `loss`."""

    loss: UnitLoss

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        ends = [
            _masked_sum(self.loss, _over_own_positions(outputs, batch, end), batch.targets[end])
            for end in ("start", "end")
        ]
        return torch.stack(ends).mean() / normalizer


def _over_own_positions(outputs: Any, batch: Batch, end: str) -> Tensor:
    # with the padding in the softmax, a row's loss would hang on how long its neighbours in the batch are
    padding = batch.inputs["attention_mask"] == 0
    return outputs[f"{end}_logits"].float().masked_fill(padding, -torch.inf)
