"""The optimizer: which parameters decay, and the recipe's settings made into our, torch's or bitsandbytes' one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tunesmith.errors import MachineError, MissingExtra, UserError
from tunesmith.recipe import Recipe
from tunesmith.recipe.kernels import Kernels
from tunesmith.recipe.optim import (
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    AdamW8bit,
    Lion8bit,
    Optim,
    RMSprop,
)
from tunesmith.shapes import whole_shape
from tunesmith_kernels import adamw, adamw8bit
from tunesmith_kernels.adamw.paths import path
from tunesmith_kernels.adamw.tensors import Precision

_FUSED_DEVICES = {"cpu", "cuda"}
_UPDATED: dict[str, Precision] = {
    "bf16_master": "master",
    "bf16_stochastic": "stochastic",
    "bf16_kahan": "kahan",
}


@dataclass(frozen=True, slots=True)
class Spec:
    """What an optimizer is built from: the recipe's section, what computes it, and for bf16 parameters how they are
    rounded, stochastically by `seed`."""

    settings: Optim
    kernels: Kernels = field(default_factory=Kernels)
    precision: Precision = "fp32"
    seed: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> Spec:
        return cls(
            recipe.optim,
            recipe.each_kernel,
            _UPDATED.get(recipe.training.precision, "fp32"),
            recipe.training.seed,
        )

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else torch.bfloat16


def parameter_groups(module: nn.Module, settings: Optim) -> list[dict[str, Any]]:
    """The trainable parameters of `module` in at most two groups for `build`, tagged "decay" and "no_decay".

    Biases, the parameters of normalisation modules (whose class name contains "Norm") and all other
    parameters of fewer than two dimensions do not decay; embeddings do. A tied parameter is listed once,
    under its first name. A group has the keys `params`, `names` (as in `named_parameters`), `tag`, `lr`,
    `lr_scale` (see `update.set_learning_rates`) and `weight_decay`; a group without parameters is left out.

    To be called before an engine flattens the parameters: it goes by their whole shapes.
    Raises UserError if no parameter is trainable.
    """
    members: dict[str, list[tuple[str, nn.Parameter]]] = {"decay": [], "no_decay": []}
    for name, parameter, decays in _trainable(module):
        members["decay" if decays else "no_decay"].append((name, parameter))
    if not any(members.values()):
        raise UserError("trainable: no parameter is left to train: freeze fewer, or unfreeze some")
    return [
        {
            "params": [parameter for _, parameter in named],
            "names": [name for name, _ in named],
            "tag": tag,
            "lr": settings.learning_rate,
            "lr_scale": 1.0,
            "weight_decay": settings.weight_decay if tag == "decay" else 0.0,
        }
        for tag, named in members.items()
        if named
    ]


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name, parameter and whether it decays, in the order of `named_parameters`."""
    seen: set[nn.Parameter] = set()
    for prefix, owner in module.named_modules():
        is_norm = "norm" in type(owner).__name__.lower()
        for leaf, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            decays = len(whole_shape(parameter)) > 1 and not is_norm and not leaf.endswith("bias")
            yield (f"{prefix}.{leaf}" if prefix else leaf), parameter, decays


def build(spec: Spec, groups: list[dict[str, Any]]) -> Optimizer:
    """The recipe's optimizer over the groups of `parameter_groups`, which are left as they are.

    AdamW is tunesmith's own. torch's Adam, SGD and Adagrad (and where `kernels` says so, AdamW) are fused where all
    parameters are floating-point ones on the CPU or on CUDA. Raises UserError for a setting that the optimizer refuses,
    MissingExtra where bitsandbytes is not installed, MachineError where the kernel that is asked for cannot run.
    """
    settings = spec.settings
    _check_kernel(spec, groups)
    try:
        return _construct(spec, [dict(group) for group in groups])
    except ValueError as error:
        raise UserError(f"optim: {settings.name}: {error}") from error


def _check_kernel(spec: Spec, groups: list[dict[str, Any]]) -> None:
    match spec.settings:
        case AdamW():
            name, asked = "adamw", spec.kernels.adamw
        case AdamW8bit():
            name, asked = "adamw_8bit", spec.kernels.adamw_8bit
        case _:
            return
    if asked in ("auto", "reference"):
        return
    try:
        path(_backend(asked), groups[0]["params"][0].device)
    except RuntimeError as error:
        raise MachineError(f"kernels.{name}: {asked} cannot run here: {error}") from error


def describe(spec: Spec, device: torch.device) -> str:
    """What computes the update on `device`, and why, in one line."""
    match spec.settings:
        case AdamW():
            asked, (path, why) = spec.kernels.adamw, adamw.path_for(device)
        case AdamW8bit():
            asked, (path, why) = spec.kernels.adamw_8bit, adamw8bit.path_for(device)
        case Lion8bit():
            return "bitsandbytes"
        case settings:
            return f"torch {settings.name}"
    return f"{path}: {why}" if asked == "auto" else f"{asked}: the recipe asks for it"


def _construct(spec: Spec, groups: list[dict[str, Any]]) -> Optimizer:
    settings = spec.settings
    lr, weight_decay = settings.learning_rate, settings.weight_decay
    fused = _can_fuse(groups)
    match settings:
        case AdamW(betas=betas, eps=eps):
            if spec.kernels.adamw == "reference":
                return torch.optim.AdamW(
                    groups, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=fused
                )
            return adamw.AdamW(
                groups,
                lr=lr,
                weight_decay=weight_decay,
                betas=betas,
                eps=eps,
                precision=spec.precision,
                seed=spec.seed,
                backend=_backend(spec.kernels.adamw),
            )
        case Adam(betas=betas, eps=eps):
            return torch.optim.Adam(
                groups, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=fused
            )
        case SGD(momentum=momentum, nesterov=nesterov):
            return torch.optim.SGD(
                groups, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, fused=fused
            )
        case RMSprop(alpha=alpha, eps=eps, momentum=momentum):
            return torch.optim.RMSprop(
                groups, lr=lr, weight_decay=weight_decay, alpha=alpha, eps=eps, momentum=momentum
            )
        case Adagrad(eps=eps, initial_accumulator_value=initial):
            return torch.optim.Adagrad(
                groups,
                lr=lr,
                weight_decay=weight_decay,
                eps=eps,
                initial_accumulator_value=initial,
                fused=fused,
            )
        case Adafactor(beta2_decay=beta2_decay, eps=eps, clip_threshold=d):
            return torch.optim.Adafactor(
                groups, lr=lr, weight_decay=weight_decay, beta2_decay=beta2_decay, eps=eps, d=d
            )
        case AdamW8bit(betas=betas, eps=eps) if spec.kernels.adamw_8bit != "reference":
            return adamw8bit.AdamW8bit(
                groups,
                lr=lr,
                weight_decay=weight_decay,
                betas=betas,
                eps=eps,
                backend=_backend(spec.kernels.adamw_8bit),
            )
        case AdamW8bit() | Lion8bit():
            return _construct_8bit(settings, groups)


def _backend(asked: Literal["auto", "reference", "cpu", "triton"]) -> Literal["cpu", "triton"] | None:
    assert asked != "reference"
    return None if asked == "auto" else asked


def _construct_8bit(settings: AdamW8bit | Lion8bit, groups: list[dict[str, Any]]) -> Optimizer:
    try:
        import bitsandbytes.optim.adamw
        import bitsandbytes.optim.lion
    except ImportError as error:
        raise MissingExtra("bitsandbytes", "bitsandbytes", f"optim.name: {settings.name}") from error
    lr, weight_decay = settings.learning_rate, settings.weight_decay
    match settings:
        case AdamW8bit(betas=betas, eps=eps):
            return bitsandbytes.optim.adamw.AdamW8bit(
                groups, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps
            )
        case Lion8bit(betas=betas):
            # its annotation says int, from a default of 0; its check and its kernels take a float
            decay = cast(int, weight_decay)
            return bitsandbytes.optim.lion.Lion8bit(groups, lr=lr, weight_decay=decay, betas=betas)


def _can_fuse(groups: list[dict[str, Any]]) -> bool:
    parameters: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
    return all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)
