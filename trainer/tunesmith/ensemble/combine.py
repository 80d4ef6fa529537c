"""Members' answers to one answer: votes, means, weighted means, and a model on top of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.ensemble.answers import Answer, Floats, Spans
from tunesmith.ensemble.fit import Linear
from tunesmith.ensemble.members import Kind
from tunesmith.errors import UserError

Method = Literal["vote", "mean", "weighted", "stack"]

_TIE = 1e-6  # of the mean probability: decides between answers with equally many votes, and no others
_SMALLEST = 1e-12  # of a probability, before its logarithm is taken


@dataclass(frozen=True, slots=True)
class Combiner:
    """`weights` [members], of weighted means; `stack`, of a model on top: its features are the members' answers."""

    kind: Kind
    method: Method
    weights: tuple[float, ...] = ()
    stack: Linear | None = None

    def __call__(self, given: Sequence[Answer]) -> Answer:
        """One example's answers, one per member. Of a vote the shares of the votes, mixed with a millionth of
        the mean probabilities, which decides ties. A word that a member did not see is answered by the others."""
        if self.kind == "spans":
            return self._spans([value for value in given if isinstance(value, dict)])
        values = np.stack(
            [value for value in given if isinstance(value, np.ndarray)]
        )  # [members, …, classes]
        match self.method:
            case "vote":
                return self._vote(values)
            case "mean":
                return _weighted(values, np.ones(len(values)))
            case "weighted":
                return _weighted(values, np.asarray(self.weights))
            case "stack":
                return self._stacked(values)

    def _vote(self, values: Floats) -> Floats:
        seen = ~np.isnan(values[..., 0])  # [members, …]
        if self.kind == "multi_label":
            ballots = (values > 0.5).astype(np.float64)
        else:
            ballots = np.zeros_like(values)
            best = np.where(np.isnan(values), -np.inf, values).argmax(-1)
            np.put_along_axis(ballots, best[..., None], 1.0, -1)
        ballots[~seen] = np.nan
        mean = _weighted(values, np.ones(len(values)))
        return (1 - _TIE) * _weighted(ballots, np.ones(len(values))) + _TIE * mean

    def _stacked(self, values: Floats) -> Floats:
        assert self.stack is not None
        found = features(values, self.kind)
        flat = found.reshape(-1, found.shape[-1])
        outputs = self.stack(np.nan_to_num(flat))
        outputs[np.isnan(flat).any(-1)] = np.nan
        return activated(outputs, self.kind).reshape(*found.shape[:-1], -1)

    def _spans(self, given: Sequence[Spans]) -> Spans:
        weights = (
            np.asarray(self.weights) if self.method == "weighted" else np.full(len(given), 1 / len(given))
        )
        mean: Spans = {}
        for weight, spans in zip(weights, given, strict=True):
            for text, probability in spans.items():
                mean[text] = mean.get(text, 0.0) + float(weight) * probability
        if self.method != "vote":
            return mean
        votes = Counter(best_span(spans) for spans in given)
        return {text: (1 - _TIE) * votes[text] / len(given) + _TIE * mean[text] for text in mean}


def best_span(spans: Spans) -> str:
    """The most probable answer; of equal ones the first by the alphabet, and no answer last."""
    return min(spans, key=lambda text: (-spans[text], not text, text))


def _weighted(values: Floats, weights: Floats) -> Floats:
    """Σ w v / Σ w over the members that have a value; NaN where none has, or none of weight."""
    shape = (-1, *(1,) * (values.ndim - 1))
    share = np.where(np.isnan(values), 0.0, weights.reshape(shape))
    total = share.sum(0)
    with np.errstate(invalid="ignore"):
        return np.where(
            total > 0, (share * np.nan_to_num(values)).sum(0) / np.where(total > 0, total, 1.0), np.nan
        )


def features(values: Floats, kind: Kind) -> Floats:
    """[members, …, classes] → […, members × classes], what a stacking model reads: log-probabilities, of several labels
    the log-odds, of numbers these. What a member did not see is the mean of the others."""
    values = np.where(np.isnan(values), _weighted(values, np.ones(len(values)))[None], values)
    if kind == "multi_label":
        clipped = np.clip(values, _SMALLEST, 1 - _SMALLEST)
        values = np.log(clipped) - np.log1p(-clipped)
    elif kind != "regression":
        values = np.log(np.maximum(values, _SMALLEST))
    moved: NDArray[np.float64] = np.moveaxis(values, 0, -2)
    return moved.reshape(*moved.shape[:-2], -1)


def activated(outputs: Floats, kind: Kind) -> Floats:
    """What a stacking model's linear outputs [rows, classes] mean: probabilities, or numbers as they are."""
    match kind:
        case "regression":
            return outputs
        case "multi_label":
            return 1.0 / (1.0 + np.exp(-outputs))
        case _:
            powers = np.exp(outputs - outputs.max(-1, keepdims=True))
            return powers / powers.sum(-1, keepdims=True)


def refuse(kind: Kind, method: Method) -> None:
    """Raises UserError for a method that is not defined on this kind of answers."""
    if method == "vote" and kind == "regression":
        raise UserError("--method vote: numbers are no votes: use mean or weighted")
    if method == "stack" and kind == "spans":
        raise UserError(
            "--method stack: the answers of question answering are texts, not a fixed set of classes that a model "
            "on top could read: use vote, mean or weighted"
        )
