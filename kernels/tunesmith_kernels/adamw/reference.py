"""AdamW in plain torch: the definition that the other paths are tested against, and the one that runs where there is
neither a compiler nor Triton. Element by element, on fp32 numbers whatever the tensors' types:

    g ← gradient × coefficient
    m ← m + (1 − β1)(g − m)
    v ← β2 v + (1 − β2) g²
    p ← p (1 − lr·wd) − lr/(1 − β1ᵗ) · m / (√v / √(1 − β2ᵗ) + eps)

(Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; as torch.optim.AdamW computes it.)

What is stored: `fp32`, all as it is. `master`, the fp32 p, and p rounded to the nearest bfloat16 beside it.
`stochastic`, p, and m and v where they are bfloat16, stochastically rounded; the unrounded m and v go into p.
`kahan`, p rounded to nearest, and in bfloat16 what that left out, which is added again at the next update; m and v
stochastically rounded: at β2 = 0.999 a nearest rounding would take back every change of v that is smaller than half
a last place, 1/512 to 1/256 of it, and v would never fall."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith_kernels.adamw.rounding import Draws, draws, round_stochastically, rounding_key
from tunesmith_kernels.adamw.tensors import Group

_PIECE = 1 << 20  # elements at a time: bounds the temporaries


@dataclass(frozen=True)
class _Numbers:
    weight1: float
    beta2: float
    weight2: float
    decay: float
    step_size: float
    root_correction2: float
    eps: float


def norm(grads: Sequence[Tensor]) -> Tensor:
    """See `Path.norm`."""
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
    return torch.linalg.vector_norm(torch.stack(norms)).float()


def clip(norm: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """See `Path.clip`."""
    # the difference is 0, or NaN where the norm is not finite
    return (max_norm / (norm + 1e-6)).clamp(max=1.0), norm - norm


@torch.no_grad()
def update(groups: Sequence[Group], coefficient: Tensor, skip: Tensor, seed: int) -> None:
    """See `Path.update`. Waits for the device: it reads `skip` and the step counters."""
    if skip.item() != 0:
        return
    for group in groups:
        for index, step in enumerate(group.steps):
            step.add_(1)
            count = int(step.item())
            numbers = _numbers(group, count)
            key = rounding_key(seed, count, group.streams[index])
            for tensors, first in _pieces(group, index):
                _update(group, tensors, numbers, coefficient, key, first)


def _numbers(group: Group, step: int) -> _Numbers:
    return _Numbers(
        weight1=torch.tensor(1 - group.beta1, dtype=torch.float32).item(),
        beta2=group.beta2,
        weight2=1 - group.beta2,
        decay=1 - group.lr * group.weight_decay,
        step_size=group.lr / (1 - group.beta1**step),
        root_correction2=(1 - group.beta2**step) ** 0.5,
        eps=group.eps,
    )


def _pieces(group: Group, index: int) -> Iterator[tuple[list[Tensor], int]]:
    """Parameter, gradient, moments and extra of one entry, a piece at a time, with the global index of its first
    element."""
    lists = (group.params, group.grads, group.exp_avgs, group.exp_avg_sqs, group.extras)
    whole = [tensors[index].detach().view(-1) for tensors in lists if tensors]
    for start in range(0, whole[0].numel(), _PIECE):
        yield [tensor[start : start + _PIECE] for tensor in whole], group.offsets[index] + start


def _update(
    group: Group, tensors: list[Tensor], numbers: _Numbers, coefficient: Tensor, key: int, first: int
) -> None:
    param, grad, exp_avg, exp_avg_sq = tensors[:4]
    match group.precision:
        case "fp32":
            before = param
        case "stochastic":
            before = param.float()
        case "master":
            before = tensors[4]
        case "kahan":
            before = param.float() + tensors[4].float()
    after, m, v = _moved(before, grad.float() * coefficient, exp_avg.float(), exp_avg_sq.float(), numbers)
    rounds = group.precision in ("stochastic", "kahan")
    bits = draws(key, first, param.numel(), param.device) if rounds else Draws(None, None, None)
    _store(exp_avg, m, bits.exp_avg)
    _store(exp_avg_sq, v, bits.exp_avg_sq)
    match group.precision:
        case "fp32":
            param.copy_(after)
        case "stochastic":
            _store(param, after, bits.param)
        case "master":
            tensors[4].copy_(after)
            param.copy_(after)
        case "kahan":
            param.copy_(after)
            tensors[4].copy_(after - param.float())


def _moved(p: Tensor, g: Tensor, m: Tensor, v: Tensor, n: _Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """The new parameter and moments, all fp32; one rounding per operation, as in native/adamw.cpp."""
    difference = g - m
    # from the nearer end, as torch.lerp: exact where β1 is 0
    m = m + difference * n.weight1 if n.weight1 < 0.5 else g - difference * (1 - n.weight1)
    v = v * n.beta2 + (g * n.weight2) * g
    root = v.double().sqrt().float()  # fp32's own is off by a last place, with torch on MKL
    return p * n.decay - (m * n.step_size) / (root / n.root_correction2 + n.eps), m, v


def _store(target: Tensor, value: Tensor, draw: Tensor | None) -> None:
    if target.dtype == torch.float32:
        target.copy_(value)
    else:
        assert draw is not None
        target.copy_(round_stochastically(value, draw))
