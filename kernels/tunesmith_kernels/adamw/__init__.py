"""AdamW: the formula is in `reference`, what a step works on in `tensors`, the torch optimizer in `optimizer`."""

from tunesmith_kernels.adamw.optimizer import AdamW
from tunesmith_kernels.adamw.paths import Backend, path_for
from tunesmith_kernels.adamw.tensors import Precision

__all__ = ["AdamW", "Backend", "Precision", "path_for"]
