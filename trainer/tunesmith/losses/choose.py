"""The recipe's loss as a term of the objective, with what the training rows say of the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tunesmith.errors import UserError
from tunesmith.losses import weights as label_weights
from tunesmith.losses.dice import Dice
from tunesmith.losses.function import load_function, try_out
from tunesmith.losses.numbers import AbsoluteError, Huber
from tunesmith.losses.ordinal import Corn, Cumulative, EarthMover, corn_probabilities
from tunesmith.losses.sigmoid import BinaryCrossEntropy, SigmoidFocal
from tunesmith.losses.softmax import LDAM, CrossEntropy, Focal, Numbers
from tunesmith.losses.weights import Labels
from tunesmith.recipe import losses as settings
from tunesmith.recipe.losses import TOKENS, VOCABULARY
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
    UnitLoss,
)

_KEY = "objective.loss"
_DEFAULT_BETA = 0.9999  # of LDAM's later weights: Cao et al. 2019, §4


def own_loss(loss: settings.Loss | None, labels: Labels, smoothing: float) -> UnitLoss | None:
    """What the term sums; None where it is the objective's own, whose term may be fused. Raises UserError where the
    labels that were found do not go with it."""
    if smoothing and labels.kind == "regression":
        raise UserError("objective.label_smoothing_factor: has no effect on regression")
    if loss is None:
        return None
    if problem := settings.unfit(labels.kind, loss):
        raise UserError(f"{_KEY}: {problem}")
    match loss:
        case settings.CrossEntropy():
            weights = _given(loss.class_weights, labels, "class_weights")
            return None if weights is None else CrossEntropy(weights, smoothing)
        case settings.BinaryCrossEntropy():
            return _binary(loss, labels, smoothing)
        case settings.MeanSquaredError():
            return None
        case settings.MeanAbsoluteError():
            return AbsoluteError()
        case settings.Huber():
            return Huber(loss.delta)
        case settings.Focal():
            return _focal(loss, labels)
        case settings.ClassBalanced():
            return _class_balanced(loss, labels)
        case settings.LDAM():
            return LDAM(label_weights.margins(labels.counted(_KEY), loss.max_margin), loss.scale)
        case settings.Ordinal():
            return {"cumulative": Cumulative(), "emd": EarthMover(), "corn": Corn()}[loss.method]
        case settings.Dice():
            return Dice(loss.smooth, loss.gamma)
        case settings.Function():
            made = load_function(loss)
            try_out(made, *_example(labels))
            return made
        case settings.Ranking():
            raise AssertionError("lists are a term of their own")


def _given(given: settings.ClassWeights | None, labels: Labels, name: str) -> Numbers | None:
    return None if given is None else label_weights.given(given, labels, f"{_KEY}.{name}")


def _binary(loss: settings.BinaryCrossEntropy, labels: Labels, smoothing: float) -> UnitLoss | None:
    weights = _given(loss.class_weights, labels, "class_weights")
    positive = (
        label_weights.positive_weights(labels, f"{_KEY}.pos_weight")
        if loss.pos_weight == "auto"
        else _given(loss.pos_weight, labels, "pos_weight")
    )
    if labels.kind == "multi_label" and weights is None and positive is None:
        return None
    return BinaryCrossEntropy(positive, weights, smoothing, labels.exclusive)


def _focal(loss: settings.Focal, labels: Labels) -> UnitLoss:
    alpha, key = loss.alpha, f"{_KEY}.alpha"
    if labels.exclusive:
        if isinstance(alpha, float | int):
            if len(labels.names) != 2:
                raise UserError(f"{key}: one number would weigh all labels alike: give a list, or auto")
            return Focal(loss.gamma, (1.0 - alpha, alpha))
        return Focal(loss.gamma, _given(alpha, labels, "alpha"))
    if alpha is None:
        return SigmoidFocal(loss.gamma)
    if alpha == "auto":
        return SigmoidFocal(loss.gamma, label_weights.rarities(labels, key))
    if isinstance(alpha, float | int):
        return SigmoidFocal(loss.gamma, (alpha,) * len(labels.names))
    each = label_weights.given(alpha, labels, key)
    if max(each) > 1:
        raise UserError(f"{key}: a no counts 1 − alpha: give numbers from 0 to 1")
    return SigmoidFocal(loss.gamma, each)


def _class_balanced(loss: settings.ClassBalanced, labels: Labels) -> UnitLoss:
    weights = label_weights.effective(labels.counted(_KEY), loss.beta)
    gamma = 2.0 if loss.gamma is None else loss.gamma
    match loss.base:
        case "cross_entropy":
            return CrossEntropy(weights)
        case "binary_cross_entropy":
            return BinaryCrossEntropy(weights=weights, exclusive=labels.exclusive)
        case "focal":
            return Focal(gamma, weights) if labels.exclusive else SigmoidFocal(gamma, weights=weights)


def _example(labels: Labels) -> tuple[int, Tensor]:
    """(width of the head, labels of three units) to try a function with; of four where the head is three wide, for
    what mixes units with outputs fails only where they are not equally many."""
    width = labels.width or len(labels.names) or 8
    units = 4 if width == 3 else 3
    match labels.kind:
        case "regression":
            return width, torch.linspace(-1.0, 1.0, units * width).view(units, width)
        case "multi_label":
            return width, (torch.arange(units * width).view(units, width) % 2).float()
        case _:
            return width, torch.tensor([0, width - 1, width // 2, 0])[:units]


def terms_of(loss: settings.Loss | None, labels: Labels, smoothing: float) -> tuple[Term, ...]:
    """The term of a classification of rows or tokens, a regression, or spans."""
    own = own_loss(loss, labels, smoothing)
    match labels.kind:
        case "single_label":
            return (RowCrossEntropy(label_smoothing=smoothing) if own is None else RowLoss(loss=own),)
        case "multi_label":
            return (RowBinaryCrossEntropy(label_smoothing=smoothing) if own is None else RowLoss(loss=own),)
        case "regression":
            return (RowSquaredError() if own is None else RowLoss(loss=own),)
        case "question_answering":
            return (SpanCrossEntropy() if own is None else SpanLoss(loss=own),)
        case _:
            assert labels.kind == TOKENS, labels.kind
            return (TokenCrossEntropy(label_smoothing=smoothing) if own is None else TokenLoss(loss=own),)


def vocabulary_term(
    loss: settings.Loss | None,
    objective: str,
    smoothing: float = 0.0,
    *,
    name: str = "loss",
    logits: str = "logits",
    shift: bool = False,
) -> Term:
    """The term of a language model."""
    assert objective in VOCABULARY, objective
    own = own_loss(loss, Labels(objective), smoothing)
    if own is None or isinstance(loss, settings.Focal):
        return planned_term(loss, smoothing, name=name, logits=logits, shift=shift)
    return TokenLoss(loss=own, name=name, logits=logits, shift=shift)


def planned_term(
    loss: settings.Loss | None,
    smoothing: float = 0.0,
    *,
    name: str = "loss",
    logits: str = "logits",
    shift: bool = False,
) -> Term:
    """As `vocabulary_term`, as far as memory can tell: all losses but those that a kernel computes need whole logits,
    and nobody's function is called."""
    if loss is None or loss.type == "cross_entropy":
        return TokenCrossEntropy(name=name, logits=logits, shift=shift, label_smoothing=smoothing)
    if loss.type == "focal":
        return TokenCrossEntropy(name=name, logits=logits, shift=shift, focal_gamma=loss.gamma)
    return TokenLoss(loss=CrossEntropy(), name=name, logits=logits, shift=shift)


def reweighted(loss: settings.Loss | None, labels: Labels) -> Term | None:
    """LDAM with the weights that it gets later, as a term that stands in for the objective's from then on."""
    if not isinstance(loss, settings.LDAM) or loss.reweight_from is None:
        return None
    plain = own_loss(loss, labels, 0.0)
    assert isinstance(plain, LDAM)
    beta = _DEFAULT_BETA if loss.beta is None else loss.beta
    later = replace(plain, weights=label_weights.effective(labels.counted(_KEY), beta))
    kind = TokenLoss if labels.kind == TOKENS else RowLoss
    return kind(loss=later, name="reweighted")


def loss_notes(loss: settings.Loss | None, labels: Labels, terms: Sequence[Term | None]) -> list[str]:
    """What the start-up report says of a loss that the recipe chose."""
    if loss is None:
        return []
    chosen = ", ".join(
        f"{name}: {value}"
        for name, value in loss.model_dump(exclude={"type"}, exclude_none=True).items()
        if value != {}
    )
    lines = [f"loss: {loss.type}{f' ({chosen})' if chosen else ''}, divided by the number of units"]
    if labels.kind in VOCABULARY and loss.type not in {"cross_entropy", "focal"}:
        lines.append("no kernel computes it: the logits of the whole vocabulary are held")
    for term in filter(None, terms):
        inner = getattr(term, "loss", None)
        for what in ("weights", "positive_weights", "alpha", "margins"):
            values: Numbers | None = getattr(inner, what, None)
            if values is not None:
                pairs = zip(labels.names, values, strict=True)
                shown = ", ".join(f"{name} {value:.4g}" for name, value in list(pairs)[:12])
                lines.append(
                    f"{what.replace('_', ' ')} of {term.name}: {shown}{', …' if len(values) > 12 else ''}"
                )
    return lines


def probabilities(loss: settings.Loss | None, logits: Tensor) -> Tensor:
    """What a single-label model says of each label: [rows, outputs] → [rows, labels], which sum to 1. One against the
    rest: the labels' σ(z), scaled to that sum."""
    match loss:
        case settings.BinaryCrossEntropy() | settings.ClassBalanced(base="binary_cross_entropy"):
            # in logs: where every label says no, σ(z) rounds to 0
            return torch.nn.functional.logsigmoid(logits).softmax(dim=-1)
        case settings.LDAM():
            return (loss.scale * logits).softmax(dim=-1)
        case settings.Ordinal(method="corn"):
            return corn_probabilities(logits)
        case _:
            return logits.softmax(dim=-1)
