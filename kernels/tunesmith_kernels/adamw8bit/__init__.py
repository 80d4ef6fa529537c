"""8-bit AdamW: the formula is in `tensors`, the codes in `codebook`, the definition in `reference`, the torch optimizer
in `optimizer`."""

from tunesmith_kernels.adamw.paths import path_for
from tunesmith_kernels.adamw8bit.optimizer import AdamW8bit

__all__ = ["AdamW8bit", "path_for"]
