"""`objective.loss`: how a prediction is held against its label; one class per type, told apart by `type`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from tunesmith.recipe.base import Fraction, NonNegativeFloat, PositiveFloat, Section
from tunesmith.recipe.moments import Moment

ClassWeights = (
    Literal["auto"]
    | Annotated[list[NonNegativeFloat], Field(min_length=1)]
    | Annotated[dict[str, NonNegativeFloat], Field(min_length=1)]
)
"""In the order of the labels, or by label, or `auto`: from the training rows."""

Effective = Annotated[float, Field(ge=0.0, lt=1.0)]


class CrossEntropy(Section):
    """−log p(label), as torch's. `class_weights` weigh a row or a token by its label; auto: n / (k · n of the label),
    which is scikit-learn's "balanced" and averages 1 over the training labels."""

    type: Literal["cross_entropy"]
    class_weights: ClassWeights | None = None


class BinaryCrossEntropy(Section):
    """Each label by itself, yes or no; one against the rest where a row has one label. `pos_weight` weighs a label's
    yes; auto: rows without it / rows with it. `class_weights` weigh a row by its label, where it may have several the
    label."""

    type: Literal["binary_cross_entropy"]
    pos_weight: ClassWeights | None = None
    class_weights: ClassWeights | None = None


class MeanSquaredError(Section):
    """(prediction − number)², averaged over a row's numbers."""

    type: Literal["mean_squared_error"]


class MeanAbsoluteError(Section):
    """|prediction − number|, averaged over a row's numbers."""

    type: Literal["mean_absolute_error"]


class Huber(Section):
    """Half the square of an error up to `delta`, delta · (|error| − delta / 2) beyond it (Huber 1964)."""

    type: Literal["huber"]
    delta: PositiveFloat = 1.0


class Focal(Section):
    """(1 − p)^gamma · cross-entropy (Lin et al. 2017): what is answered well already counts less. `gamma`: how much
    less. `alpha` weighs labels: in the softmax form like class weights (one number a of two labels: 1 − a and a), in
    the sigmoid form alpha weighs a label's yes and 1 − alpha its no; auto: by how rare a label is."""

    type: Literal["focal"]
    gamma: NonNegativeFloat = 2.0
    alpha: Fraction | ClassWeights | None = None


class ClassBalanced(Section):
    """`base` with the weights (1 − beta) / (1 − beta^n of the label) (Cui et al. 2019), scaled to average 1 over the
    training labels. `gamma` is that of the base focal (null: 2)."""

    type: Literal["class_balanced"]
    beta: Effective = 0.999
    base: Literal["cross_entropy", "binary_cross_entropy", "focal"] = "cross_entropy"
    gamma: NonNegativeFloat | None = None


class LDAM(Section):
    """Cross-entropy of scale · logits, the label's own lowered by a margin in proportion to its count^(−1/4) (Cao et
    al. 2019); `max_margin` is that of the rarest label. From `reweight_from` on rows are also weighed as class_balanced
    weighs them with `beta` (null: 0.9999)."""

    type: Literal["ldam"]
    max_margin: PositiveFloat = 0.5
    scale: PositiveFloat = 1.0
    reweight_from: Moment | None = None
    beta: Effective | None = None


class Ordinal(Section):
    """Labels in an order, which is that of the labels. `method`: cumulative (the logarithmic score of every "beyond
    label k", Tödter & Ahrens 2012), emd (squared earth mover's distance, Hou et al. 2016), corn (a chain of binary
    questions "beyond label k, given that beyond k − 1", Shi et al. 2023; the head has an output less)."""

    type: Literal["ordinal"]
    method: Literal["cumulative", "emd", "corn"] = "cumulative"


class Ranking(Section):
    """The order of a group's texts by their numbers (`columns: {group: …}`). `method`: ranknet (Burges et al. 2005),
    margin (pairs apart by `margin`, null: 1), listnet (Cao et al. 2007), listmle (Xia et al. 2008)."""

    type: Literal["ranking"]
    method: Literal["ranknet", "margin", "listnet", "listmle"] = "ranknet"
    margin: PositiveFloat | None = None


class Dice(Section):
    """Self-adjusting dice (Li et al. 2020), token by token: with q = (1 − p)^gamma · p, 1 − (2qy + smooth) / (q + y +
    smooth), averaged over the labels. `gamma` is their alpha, `smooth` their gamma."""

    type: Literal["dice"]
    smooth: PositiveFloat = 1.0
    gamma: Fraction = 0.01


class Function(Section):
    """A function of yours: `function` is path.py:name (relative to the recipe) or module:name. It is called with
    (logits, labels), with mask where it takes one, and with `options`, and returns a loss per row or token. `sha256` of
    its file is filled in when a run starts; a run that goes on, or is evaluated, must find the same."""

    type: Literal["function"]
    function: Annotated[str, Field(pattern=r"^.+:[A-Za-z_][A-Za-z0-9_.]*$")]
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    sha256: str | None = None


Loss = (
    CrossEntropy
    | BinaryCrossEntropy
    | MeanSquaredError
    | MeanAbsoluteError
    | Huber
    | Focal
    | ClassBalanced
    | LDAM
    | Ordinal
    | Ranking
    | Dice
    | Function
)
TYPES = frozenset(get_args(kind.model_fields["type"].annotation)[0] for kind in get_args(Loss))


def _one_word(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) and value in TYPES else value


ChosenLoss = Annotated[
    Annotated[Loss, Field(discriminator="type")] | None,
    BeforeValidator(_one_word),
]
"""null: the objective's own."""

TOKENS = "token_classification"
VOCABULARY = frozenset({"causal_lm", "sft", "masked_lm", "span_corruption", "seq2seq"})
_SINGLE, _SEVERAL, _NUMBERS = "single_label", "multi_label", "regression"
_COMMON = frozenset({"binary_cross_entropy", "focal", "class_balanced", "function"})
ALLOWED: dict[str, frozenset[str]] = {
    _SINGLE: _COMMON | {"cross_entropy", "ldam", "ordinal"},
    _SEVERAL: _COMMON,
    _NUMBERS: frozenset({"mean_squared_error", "mean_absolute_error", "huber", "ranking", "function"}),
    TOKENS: _COMMON | {"cross_entropy", "ldam", "dice"},
    "question_answering": frozenset({"cross_entropy", "focal"}),
    **dict.fromkeys(VOCABULARY, frozenset({"cross_entropy", "focal", "function"})),
}
"""The losses of a kind of label: of a classification's problem, of any other objective."""

SMOOTHED = frozenset({"cross_entropy", "binary_cross_entropy"})
"""Those that label smoothing is defined for here."""


def unfit(kind: str, loss: Loss) -> str | None:
    """Why `loss` is no loss for labels of this kind (a key of ALLOWED), with those that are."""
    if loss.type in ALLOWED[kind]:
        if kind == _SEVERAL and isinstance(loss, ClassBalanced) and loss.base == "cross_entropy":
            return "its base cross_entropy wants one label per row: set base: binary_cross_entropy"
        return None
    return f"{loss.type} is no loss for {kind.replace('_', ' ')}; it takes {', '.join(sorted(ALLOWED[kind]))}"
