"""What a step of AdamW works on: the tensors and numbers of the parameter groups, as every path takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Precision = Literal["fp32", "master", "stochastic", "kahan"]


@dataclass(frozen=True)
class Group:
    """Tensors of one dtype and device that share their hyperparameters. All lists have one entry per tensor, and
    the tensors of an entry one number of elements; they are contiguous and are updated in place.

    precision   params, grads   exp_avgs, exp_avg_sqs   extras
    fp32        fp32            fp32                    none
    master      bf16            fp32                    fp32, the parameter itself
    stochastic  bf16            bf16 or fp32            none
    kahan       bf16            bf16                    bf16, what rounding left out of the parameter

    steps: 0-dim fp32 on the parameters' device, how many updates were made before this one.
    streams, offsets: where stochastic rounding draws its numbers: which parameter of the model, and the index of
        the first element here within the whole of it (not 0 for a shard).
    """

    precision: Precision
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    extras: Sequence[Tensor]
    steps: Sequence[Tensor]
    streams: Sequence[int]
    offsets: Sequence[int]
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class Path(Protocol):
    """One way to compute: plain torch, C++ on the CPU, or Triton."""

    def norm(self, grads: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all gradients together, 0-dim fp32 on their device, accumulated beyond fp32; NaN or
        infinite where one of them is. Never waits for the device. `grads` is not empty."""
        ...

    def clip(self, norm: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
        """What `update` takes to clip gradients of norm `norm` (0-dim): the coefficient min(1, max_norm / (norm +
        1e-6)), torch.nn.utils.clip_grad_norm_'s, and a skip that is not 0 (it may be NaN) where the norm is not
        finite. Both 0-dim fp32 on the norm's device, without waiting for it."""
        ...

    def update(self, groups: Sequence[Group], coefficient: Tensor, skip: Tensor, seed: int) -> None:
        """One AdamW update (Loshchilov and Hutter 2019, as torch.optim.AdamW has it) with the gradients ×
        `coefficient`, and none at all where `skip` is not 0: then every tensor stays as it is, bit for bit. The
        gradients are only read.

        coefficient, skip: 0-dim fp32 on the tensors' device; never read on the host by the Triton path.
        """
        ...
