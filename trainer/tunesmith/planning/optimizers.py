"""What an optimizer keeps and needs, in bytes, by the shapes of what it updates."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tunesmith.recipe.kernels import Kernels
from tunesmith.recipe.optim import SGD, Adafactor, Adagrad, Adam, AdamW, AdamW8bit, Lion8bit, Optim, RMSprop

_8BIT_FROM = (
    4096  # elements: bitsandbytes keeps smaller tensors' state in fp32 (Optimizer2State, min_8bit_size)
)
_8BIT_BLOCK = 256  # elements that share one fp32 scale (blockwise quantisation, Dettmers et al. 2022)

BF16_STATE_BYTES = {"bf16_master": 12, "bf16_stochastic": 4, "bf16_kahan": 6}
"""Per element, of our AdamW on bf16 parameters: fp32 moments and master; moments in bf16; these and what rounding left
out. By `training.precision`."""


def state_bytes(settings: Optim, shapes: Sequence[tuple[int, ...]]) -> int:
    """Of the optimizer's state for fp32 tensors of these shapes; step counters (4 bytes each) included where the
    optimizer has tensors for them."""
    return sum(_state(settings, shape) for shape in shapes)


def _state(settings: Optim, shape: tuple[int, ...]) -> int:
    numel = prod(shape)
    match settings:
        case AdamW() | Adam():
            return 8 * numel + 4
        case SGD(momentum=momentum):
            return 4 * numel if momentum else 0
        case RMSprop(momentum=momentum):
            return (8 if momentum else 4) * numel + 4
        case Adagrad():
            return 4 * numel + 4
        case Adafactor():
            # a row and a column of means for a matrix (Shazeer & Stern 2018), all of it for the rest
            return 4 * (numel // shape[-1] + numel // shape[-2] if len(shape) > 1 else numel) + 4
        case AdamW8bit():
            return _eight_bit(numel, 2)
        case Lion8bit():
            return _eight_bit(numel, 1)


def _eight_bit(numel: int, moments: int) -> int:
    if numel < _8BIT_FROM:
        return 4 * moments * numel
    scales = -(-numel // _8BIT_BLOCK)
    return moments * (numel + 4 * scales)


def temporaries(settings: Optim, kernels: Kernels, shapes: Sequence[tuple[int, ...]], device: str) -> int:
    """The most that one update needs beside gradients and state. Our own and torch's fused ones need nothing; RMSprop
    takes a root per tensor; Adafactor squares the gradient, then holds a variance and the update, per tensor
    (torch.optim's single-tensor implementations). bitsandbytes' kernels for CUDA need nothing; on the CPU its 8-bit
    optimizers (Lion, and AdamW where the recipe asks for the reference) are made of torch's operations, on moments in
    fp32 (bitsandbytes/backends/default/ops.py)."""
    largest = max((prod(shape) for shape in shapes), default=0)
    match settings:
        case RMSprop():
            return 4 * largest
        case Adafactor():
            return 8 * largest
        case AdamW8bit() if kernels.adamw_8bit != "reference":
            return 0
        case AdamW8bit() | Lion8bit() if device == "cpu":
            return 5 * 4 * largest  # AdamW: two moments, a root, the quotient and its product with the rate
        case _:
            return 0
