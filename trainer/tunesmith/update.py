"""One update: learning rates set, the gradient scaled, and where it must not be, nothing changed: on the device."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from tunesmith.trainable.plan import warmed_up


class _FusedOptimizer(Optimizer):
    """The two attributes that torch's fused optimizers read in `step`: GradScaler's side of a protocol that
    torch does not type. They divide the gradient by `grad_scale`, and where `found_inf` is exactly 1 the
    kernels return before they write and the step counters are taken back."""

    grad_scale: Tensor
    found_inf: Tensor


def set_learning_rates(optimizer: Optimizer, lr: float, step: int) -> None:
    """Gives every group its rate at `step` (0-based): `lr` × its `lr_scale` × how far its own warm-up is, which takes
    `warmup` steps from `opens` on. To be done before every step, since loading a state may bring others."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"] * warmed_up(step, group["opens"], group["warmup"])


@torch.no_grad()
def step(optimizer: Optimizer, coefficient: Tensor, skip: Tensor) -> None:
    """One update with the gradients × `coefficient`; none at all where `skip` is not 0.

    coefficient: 0-dim, fp32, on the gradients' device: clipping × un-scaling, above 0 unless `skip` is set.
    skip: 0-dim, any dtype, same device. A suppressed step leaves the parameters bitwise as they were,
        whatever the gradients are, and the state as if it had never happened (state that did not exist may
        exist as zeros).

    The fused optimizers do it without waiting for the device; the others (RMSprop, Adafactor, 8-bit) read
    both numbers on the host, once. The gradients are not preserved.
    """
    with scaled(optimizer, coefficient, skip):
        optimizer.step()


@contextmanager
def scaled(optimizer: Optimizer, coefficient: Tensor, skip: Tensor) -> Generator[None]:
    """Makes every `optimizer.step()` inside what `step` describes: for an engine that calls it by itself, and on
    parameters of its own."""
    if optimizer.param_groups[0].get("fused"):
        with _fused(cast(_FusedOptimizer, optimizer), coefficient, skip):
            yield
        return
    suppressed, factor = torch.stack([(skip != 0).double(), coefficient.double()]).tolist()

    held: list[tuple[Tensor, Tensor]] = []

    def prepare(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if suppressed:
            for parameter in parameters:  # one without a gradient is left alone
                held.append((parameter, parameter.grad))
                parameter.grad = None
        elif factor != 1.0 and parameters:
            grads = [p.grad for p in parameters]
            torch._foreach_mul_(grads, factor)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    def restore(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, grad in held:
            parameter.grad = grad
        held.clear()

    hooks = optimizer.register_step_pre_hook(prepare), optimizer.register_step_post_hook(restore)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _fused(optimizer: _FusedOptimizer, coefficient: Tensor, skip: Tensor) -> Generator[None]:
    hook = (
        optimizer.register_step_pre_hook(_fill_momentum) if isinstance(optimizer, torch.optim.SGD) else None
    )
    optimizer.grad_scale = coefficient.float().reciprocal()
    optimizer.found_inf = (skip != 0).float()
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf
        if hook is not None:
            hook.remove()


def _fill_momentum(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Momentum buffers of zeros, where there is none yet. torch's fused SGD (2.13) begins with uninitialised
    memory, which a suppressed first step leaves in place, and fails on a parameter whose first gradient comes
    later than the others'. From zeros the first update is the same: momentum × 0 + gradient."""
    for group in optimizer.param_groups:
        if group["momentum"] == 0:
            continue
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
