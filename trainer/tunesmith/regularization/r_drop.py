"""R-Drop (`regularization.r_drop`; Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks"): every row
stands twice in the batch, with dropout of its own each time, and its two predictions p₁ and p₂ are drawn together:

    loss = ½ (L₁ + L₂) + alpha · ½ (KL(p₁‖p₂) + KL(p₂‖p₁))

summed over the labelled units, as the authors' code has it (in the paper's formula the L are added, not meaned: its
alpha is twice this one). For a regression p are no distributions, and the squared difference stands in place of both
divergences. An objective of several terms has a divergence for each, with the term's weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tunesmith.batch import IGNORED, Batch
from tunesmith.engine import Engine
from tunesmith.errors import UserError
from tunesmith.fused_head import HeadOutput
from tunesmith.losses.dice import Dice
from tunesmith.losses.numbers import AbsoluteError, Huber
from tunesmith.losses.sigmoid import BinaryCrossEntropy, SigmoidFocal
from tunesmith.losses.softmax import LDAM, CrossEntropy, Focal
from tunesmith.parts import ForwardPart
from tunesmith.terms import (
    RowBinaryCrossEntropy,
    RowCrossEntropy,
    RowLoss,
    RowSquaredError,
    SpanCrossEntropy,
    SpanLoss,
    Term,
    TokenCrossEntropy,
    TokenLoss,
)

_KEY = "regularization.r_drop"


@dataclass(frozen=True, slots=True)
class _Pairs:
    """What the divergences share: `term` is the objective's, whose units these are. A batch that other strategies
    repeat too is compared half by half: all first copies with all second ones. The normalizer counts every copy, which
    makes the sum of both directions their mean."""

    term: Term
    name: str
    weight: float

    def units(self, batch: Batch) -> int:
        return self.term.units(batch)


@dataclass(frozen=True, slots=True)
class TokenPairs(_Pairs):
    """Σ over the labelled positions of KL(p₁‖p₂) + KL(p₂‖p₁). `logits` [2 × rows, positions, classes] of the outputs,
    or their stand-in; labels `target` [2 × rows, positions]."""

    target: str = "labels"
    logits: str = "logits"
    shift: bool = False

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        logits: Tensor | HeadOutput = outputs[self.logits]
        labels, shift = batch.targets[self.target], self.shift and not batch.aligned
        labels = _halves(labels[:, 1:] if shift else labels)[0]
        if isinstance(logits, HeadOutput):
            return _fused_both_ways(logits.without_last() if shift else logits, labels, normalizer)
        found = both_ways(*_halves(logits[:, :-1] if shift else logits))
        return torch.where(labels != IGNORED, found, 0.0).sum() / normalizer


@dataclass(frozen=True, slots=True)
class RowPairs(_Pairs):
    """The same over rows with one label: `logits` [2 × rows, classes]."""

    logits: str = "logits"

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        return _over_rows(both_ways(*_halves(outputs[self.logits])), batch, normalizer)


@dataclass(frozen=True, slots=True)
class LabelPairs(_Pairs):
    """The same over rows with several labels, each yes or no: the mean over a row's labels. logits [2 × rows,
    labels]."""

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        first, second = _halves(outputs["logits"].float())
        # KL(p‖q) + KL(q‖p) of two yes-or-no distributions is (p − q)(logit p − logit q)
        found = (first.sigmoid() - second.sigmoid()) * (first - second)
        return _over_rows(found.mean(-1), batch, normalizer)


@dataclass(frozen=True, slots=True)
class NumberPairs(_Pairs):
    """For regression: twice the squared difference of the two predictions, meaned over a row's numbers. logits [2 ×
    rows, numbers]."""

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        first, second = _halves(outputs["logits"].float())
        return _over_rows(2.0 * (first - second).square().mean(-1), batch, normalizer)


@dataclass(frozen=True, slots=True)
class SpanPairs(_Pairs):
    """For spans: the mean of the start's and the end's divergences, over a row's own positions. start_logits,
    end_logits [2 × rows, positions]."""

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        padding = batch.inputs["attention_mask"] == 0
        ends: list[Tensor] = []
        for end in ("start", "end"):
            # a number that leaves no probability and, unlike −∞, no NaN in p · log p
            logits = outputs[f"{end}_logits"].float().masked_fill(padding, -1e30)
            ends.append(both_ways(*_halves(logits)))
        return _over_rows(torch.stack(ends).mean(0), batch, normalizer)


def both_ways(first: Tensor, second: Tensor) -> Tensor:
    """KL(p‖q) + KL(q‖p) = Σ (p − q)(log p − log q) of the softmax of two logits [..., classes]: [...], in fp32, or fp64
    for fp64."""
    dtype = torch.promote_types(first.dtype, torch.float32)
    p, q = (F.log_softmax(logits, dim=-1, dtype=dtype) for logits in (first, second))
    return ((p.exp() - q.exp()) * (p - q)).sum(-1)


def _fused_both_ways(output: HeadOutput, labels: Tensor, normalizer: Tensor) -> Tensor:
    """Σ over the labelled positions of both divergences / normalizer, without logits: each half is a student of the
    other, which by itself gets no gradient, for both directions."""
    total: list[Tensor] = []
    halves = [replace(output, hidden=hidden) for hidden in _halves(output.hidden)]
    for student, other in (halves, reversed(halves)):
        teacher = other.as_teacher(None)
        bias = None if teacher.bias is None else teacher.bias.detach()
        teacher = replace(teacher, hidden=teacher.hidden.detach(), weight=teacher.weight.detach(), bias=bias)
        for divergence in ("forward_kl", "reverse_kl"):
            found = student.distillation(
                teacher, labels, normalizer=normalizer, divergence=divergence, beta=0.5, temperature=1.0
            )
            total.append(found)
    # the value is that of one half's pair; the other's is the same, and adds its gradient only
    first, second = total[0] + total[1], total[2] + total[3]
    return first + (second - second.detach())


def _halves(value: Tensor) -> tuple[Tensor, Tensor]:
    first, second = value.chunk(2)
    return first, second


def _over_rows(found: Tensor, batch: Batch, normalizer: Tensor) -> Tensor:
    """found [rows]."""
    return torch.where(_halves(batch.targets["row_mask"])[0] > 0, found, 0.0).sum() / normalizer


class TwoViews(ForwardPart):
    """Each row twice. Raises UserError where nothing in the model would tell the two apart."""

    views = 2

    def __init__(self, noisy: bool) -> None:
        self._noisy = noisy  # by something other than dropout

    def begin(self, engine: Engine) -> None:
        module = engine.train_module
        module.train()
        if not self._noisy and not any(drops(part) for part in module.modules() if part.training):
            raise UserError(
                f"{_KEY}: has no effect: nothing that is trained of {type(module.model).__name__} drops units, and a "
                "row's two passes would be equal; set model.dropout: 0.1, or the adapters' lora_dropout"
            )


def drops(module: nn.Module) -> bool:
    """Whether it has a rate of dropout above 0: transformers' attention keeps one as a plain number."""
    if isinstance(module, nn.modules.dropout._DropoutNd):  # pyright: ignore[reportPrivateUsage]
        return module.p > 0
    rates = {name: value for name, value in vars(module).items() if "drop" in name.lower()}
    return any(isinstance(value, float) and value > 0 for value in rates.values())


def divergences(terms: Sequence[Term], alpha: float) -> tuple[Term, ...]:
    """A term for each of an objective's. Raises UserError for one whose predictions are not known here."""
    return tuple(_pairs(term, alpha, f"r_drop/{term.name}" if len(terms) > 1 else "r_drop") for term in terms)


def _pairs(term: Term, alpha: float, name: str) -> Term:
    about: tuple[Term, str, float] = (term, name, alpha * term.weight)
    match term:
        case TokenCrossEntropy() | TokenLoss(loss=CrossEntropy() | Focal() | LDAM() | Dice()):
            return TokenPairs(*about, term.target, term.logits, term.shift)
        case RowCrossEntropy():
            return RowPairs(*about, term.logits)
        case RowLoss(loss=CrossEntropy() | Focal() | LDAM()):
            return RowPairs(*about)
        case RowBinaryCrossEntropy() | RowLoss(loss=BinaryCrossEntropy() | SigmoidFocal()):
            return LabelPairs(*about)
        case RowSquaredError() | RowLoss(loss=AbsoluteError() | Huber()):
            return NumberPairs(*about)
        case SpanCrossEntropy() | SpanLoss():
            return SpanPairs(*about)
        case _:
            loss = getattr(term, "loss", term)
            raise UserError(
                f"{_KEY}: compares two predictions of a row, and does not know those of {type(loss).__name__}: leave "
                "it out, or choose another objective.loss"
            )
