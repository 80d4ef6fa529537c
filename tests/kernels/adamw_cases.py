"""Parameters and gradients for the tests of AdamW, and AdamW in fp64 and in torch to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith_kernels.adamw import AdamW, Precision

SIZES = (1, 3, 1000, 65_537)
FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Kind:
    """A precision, and the type of the moments where there is a choice."""

    precision: Precision
    state_dtype: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        return FP32 if self.precision == "fp32" else BF16


KINDS = {
    "fp32": Kind("fp32"),
    "master": Kind("master"),
    "stochastic": Kind("stochastic"),
    "stochastic, fp32 moments": Kind("stochastic", FP32),
    "kahan": Kind("kahan"),
}

SETTINGS: tuple[dict[str, Any], ...] = (
    {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    {"lr": 1e-2, "betas": (0.3, 0.95), "eps": 1e-6, "weight_decay": 0.2},
)


def values(dtype: torch.dtype, sizes: Sequence[int] = SIZES, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, generator=generator) * 0.1).to(dtype) for size in sizes]


def gradients(
    steps: int, dtype: torch.dtype, sizes: Sequence[int] = SIZES, scale: float = 0.1
) -> list[list[Tensor]]:
    """Per step and parameter; their sizes differ from step to step."""
    generator = torch.Generator().manual_seed(1)
    return [
        [(torch.randn(size, generator=generator) * scale * (1 + step % 3)).to(dtype) for size in sizes]
        for step in range(steps)
    ]


def parameters(initial: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(value.clone()) for value in initial]


def grouped(params: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Every second parameter in one group, the others in a second one of other settings."""
    return [{"params": list(params[i::2]), **settings} for i, settings in enumerate(SETTINGS)]


def make(params: Sequence[nn.Parameter], kind: Kind, **options: Any) -> AdamW:
    return AdamW(grouped(params), precision=kind.precision, state_dtype=kind.state_dtype, **options)


def run(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], grads: list[list[Tensor]]) -> None:
    for of_step in grads:
        for param, grad in zip(params, of_step, strict=True):
            param.grad = grad.clone()
        optimizer.step()


def everything(optimizer: AdamW, params: Sequence[nn.Parameter]) -> list[Tensor]:
    """Copies of the parameters and of all of their state."""
    states = [optimizer.state[param] for param in params]
    return [param.detach().clone() for param in params] + [
        value.clone() for state in states for value in state.values()
    ]


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Bit for bit, NaNs included."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])

    return len(first) == len(second) and all(
        a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True)
    )


@dataclass(frozen=True)
class Exact:
    """AdamW's formula in fp64: the parameters, and their moments."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]


def exact(
    initial: Sequence[Tensor],
    grads: list[list[Tensor]],
    max_norm: float | None = None,
    decays: bool = True,
    corrects: bool = True,
) -> Exact:
    """The parameters in the groups of `grouped`. decays, corrects: False leaves a term of the formula out."""
    state = Exact(
        [value.double() for value in initial],
        [torch.zeros_like(value, dtype=torch.float64) for value in initial],
        [torch.zeros_like(value, dtype=torch.float64) for value in initial],
    )
    for step, of_step in enumerate(grads, start=1):
        wide = [grad.double() for grad in of_step]
        if max_norm is not None:
            norm = torch.cat(wide).norm()
            wide = [grad * min(1.0, max_norm / (norm + 1e-6)) for grad in wide]
        for index, (g, p, m, v) in enumerate(
            zip(wide, state.params, state.exp_avgs, state.exp_avg_sqs, strict=True)
        ):
            settings = SETTINGS[index % 2]
            (beta1, beta2), lr = settings["betas"], settings["lr"]
            if decays:
                p.mul_(1 - lr * settings["weight_decay"])
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g * g)
            first, second = (1 - beta1**step, 1 - beta2**step) if corrects else (1.0, 1.0)
            p.sub_(lr * (m / first) / ((v / second).sqrt() + settings["eps"]))
    return state


def torchs(
    initial: Sequence[Tensor], grads: list[list[Tensor]], max_norm: float | None = None
) -> tuple[list[nn.Parameter], torch.optim.AdamW]:
    """torch's AdamW in the type of `initial`, after the gradients."""
    params = parameters(initial)
    optimizer = torch.optim.AdamW(grouped(params), foreach=False)
    for of_step in grads:
        for param, grad in zip(params, of_step, strict=True):
            param.grad = grad.to(param.dtype, copy=True)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
    return params, optimizer
