"""Losses for recipes: `objective.loss: {type: function, function: "losses.py:hinge"}`."""

from torch import Tensor


def hinge(logits: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    """Σ over the wrong labels of max(0, margin − (logit of the right one − logit)), per unit: logits [units, outputs],
    labels int64 [units] → [units]. Weston & Watkins 1999, "Support vector machines for multi-class pattern
    recognition"."""
    own = logits.gather(-1, labels[:, None])
    return (logits - own + margin).clamp_min(0).sum(-1) - margin
