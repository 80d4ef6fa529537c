"""Which parameters of a model are trained, from which step on, and how fast."""

from tunesmith.trainable.plan import Plan, Training
from tunesmith.trainable.resolve import apply_trainable, counts, plan_trainable

__all__ = ["Plan", "Training", "apply_trainable", "counts", "plan_trainable"]
