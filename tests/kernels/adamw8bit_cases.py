"""What the tests of 8-bit AdamW share: groups of tensors for a path, and the gradients of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith_kernels.adamw8bit.codebook import standard_books
from tunesmith_kernels.adamw8bit.tensors import Group

BF16, FP32, CPU = torch.bfloat16, torch.float32, torch.device("cpu")
TENSORS = ("params", "grads", "states1", "states2", "absmaxes1", "absmaxes2", "steps")
SEED = 0xFEDC_BA98_7654_3210


@dataclass(frozen=True)
class Case:
    """One group for a path. shift: elements by which the storages are off a 16-byte boundary."""

    numels: tuple[int, ...] = (9_001, 256, 1, 255, 1024)
    dtype: torch.dtype = FP32
    encoded: bool = True
    stochastic: bool = False
    block_size: int = 256
    offset: int = 0
    shift: int = 0
    steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    updates: int = 5


CASES = {
    "fp32": Case(),
    "bf16": Case(dtype=BF16),
    "bf16, stochastic": Case(dtype=BF16, stochastic=True, offset=(1 << 32) - 300),
    "fp32, fp32 moments": Case(encoded=False),
    "bf16, stochastic, fp32 moments": Case(dtype=BF16, stochastic=True, encoded=False, offset=7),
    "blocks of 64": Case(numels=(10_001, 63), block_size=64),
    "blocks of 4096": Case(numels=(10_001, 4096), block_size=4096, dtype=BF16),
    "misaligned": Case(numels=(4096, 777), shift=1),
    "betas of 0": Case(numels=(3000,), beta1=0.0, beta2=0.0),
    "late, without decay": Case(numels=(3000,), steps=5000, weight_decay=0.0, eps=1e-3),
}


def group_of(case: Case) -> Group:
    generator = torch.Generator().manual_seed(1)

    def placed(tensor: Tensor) -> Tensor:
        storage = torch.empty(tensor.numel() + case.shift, dtype=tensor.dtype)
        return storage[case.shift :].copy_(tensor)

    params = [placed(0.02 * torch.randn(n, generator=generator).to(case.dtype)) for n in case.numels]
    state = torch.uint8 if case.encoded else FP32
    blocks = [-(-n // case.block_size) for n in case.numels]
    return Group(
        params=params,
        grads=[placed(torch.zeros_like(param)) for param in params],
        states1=[placed(torch.zeros(n, dtype=state)) for n in case.numels],
        states2=[placed(torch.zeros(n, dtype=state)) for n in case.numels],
        absmaxes1=[torch.zeros(n) for n in blocks] if case.encoded else [],
        absmaxes2=[torch.zeros(n) for n in blocks] if case.encoded else [],
        steps=[torch.tensor(float(case.steps)) for _ in params],
        books=standard_books(CPU) if case.encoded else None,
        block_size=case.block_size,
        stochastic=case.stochastic,
        streams=list(range(len(params))),
        offsets=[case.offset] * len(params),
        lr=1e-3,
        beta1=case.beta1,
        beta2=case.beta2,
        eps=case.eps,
        weight_decay=case.weight_decay,
    )


def run(case: Case, update: Callable[..., None], skip: float = 0.0) -> list[dict[str, list[Tensor]]]:
    """What `update` makes of the case's group: its tensors after every update. The gradients span many orders of
    magnitude within a block; those of one update are all 0, those of another so small that squares are subnormal."""
    group = group_of(case)
    generator = torch.Generator().manual_seed(2)
    found: list[dict[str, list[Tensor]]] = []
    for turn in range(case.updates):
        for grad in group.grads:
            noise = torch.randn((2, *grad.shape), generator=generator)
            scale = {2: 0.0, 3: 1e-18}.get(turn, 1e-3)
            grad.copy_(noise[0] * torch.exp(2 * noise[1]) * scale)
        update([group], torch.tensor(0.7), torch.tensor(skip), SEED)
        found.append({name: [tensor.clone() for tensor in getattr(group, name)] for name in TENSORS})
    return found


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
