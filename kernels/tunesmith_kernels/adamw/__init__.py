"""AdamW: the formula is in `reference`, what a step works on in `tensors`, the torch optimizer in `optimizer`."""

from tunesmith_kernels.adamw.optimizer import AdamW
from tunesmith_kernels.adamw.paths import path_for

__all__ = ["AdamW", "path_for"]
