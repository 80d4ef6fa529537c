"""Weights of labels: as the recipe gives them, or from how often each label occurs in the training rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import expm1, log

from tunesmith.errors import UserError
from tunesmith.losses.softmax import Numbers
from tunesmith.recipe.losses import ClassWeights


@dataclass(frozen=True, slots=True)
class Labels:
    """What the training rows say of the labels. `kind`: a key of `recipe.losses.ALLOWED`; `counts`: how often each of
    `names` occurs; `rows`: of how many rows, or tags."""

    kind: str
    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    rows: int = 0
    width: int = 0  # numbers of a regression

    @property
    def exclusive(self) -> bool:
        return self.kind != "multi_label"

    def counted(self, key: str) -> tuple[int, ...]:
        """The counts. Raises UserError where a label never occurs: no weight follows from that."""
        if absent := [name for name, count in zip(self.names, self.counts, strict=True) if not count]:
            raise UserError(
                f"{key}: no training row has the label {', '.join(absent[:5])}: give weights, or leave it out of "
                "objective.labels"
            )
        return self.counts


def balanced(counts: Sequence[int]) -> Numbers:
    """n / (k · n_c) with n = Σ n_c, k labels: scikit-learn's "balanced" (King & Zeng 2001). Σ n_c · w_c = n."""
    return tuple(sum(counts) / (len(counts) * count) for count in counts)


def effective(counts: Sequence[int], beta: float) -> Numbers:
    """In proportion to (1 − beta) / (1 − beta^n_c) (Cui et al. 2019), scaled so that Σ n_c · w_c = Σ n_c; theirs are
    scaled to Σ w_c = k, which makes the loss smaller the rarer the labels."""
    raw = [1.0 if beta == 0 else (1.0 - beta) / -expm1(count * log(beta)) for count in counts]
    mean = sum(c * w for c, w in zip(counts, raw, strict=True)) / sum(counts)
    return tuple(weight / mean for weight in raw)


def margins(counts: Sequence[int], largest: float) -> Numbers:
    """largest · (min n / n_c)^(1/4) (Cao et al. 2019, equation 12)."""
    return tuple(largest * (min(counts) / count) ** 0.25 for count in counts)


def positive_weights(labels: Labels, key: str) -> Numbers:
    """Rows without a label / rows with it."""
    return tuple((labels.rows - count) / count for count in labels.counted(key))


def rarities(labels: Labels, key: str) -> Numbers:
    """The share of rows without a label: focal alpha by inverse frequency (Lin et al. 2017, §3.1)."""
    return tuple(1.0 - count / labels.rows for count in labels.counted(key))


def given(weights: ClassWeights, labels: Labels, key: str) -> Numbers:
    """The recipe's own, in the order of the labels; `auto` are the balanced ones. Raises UserError where they are not
    one for each label."""
    if isinstance(weights, Mapping):
        if unknown := sorted(weights.keys() - set(labels.names)):
            raise UserError(
                f"{key}: {unknown[0]} is no label; they are {', '.join(labels.names[:12])}"
                + (", …" if len(labels.names) > 12 else "")
            )
        if missing := [name for name in labels.names if name not in weights]:
            raise UserError(f"{key}: no weight for {', '.join(missing[:12])}")
        return tuple(weights[name] for name in labels.names)
    if isinstance(weights, str):
        return balanced(labels.counted(key))
    if len(weights) != len(labels.names):
        raise UserError(
            f"{key}: {len(weights)} weights for {len(labels.names)} labels ({', '.join(labels.names[:12])})"
        )
    return tuple(weights)
