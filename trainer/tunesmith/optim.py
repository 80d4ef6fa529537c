"""The optimizer: which parameters decay, and the recipe's settings made into our, torch's or bitsandbytes' one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
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
from tunesmith.trainable.plan import Plan, places
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
    """What an optimizer is built from: the recipe's section, what computes it, for bf16 parameters how they are
    rounded, stochastically by `seed`, and which parameters are trained when, and how fast."""

    settings: Optim
    kernels: Kernels = field(default_factory=Kernels)
    precision: Precision = "fp32"
    seed: int = 0
    plan: Plan = field(default_factory=Plan)

    @classmethod
    def of(cls, recipe: Recipe, plan: Plan | None = None) -> Spec:
        return cls(
            recipe.optim,
            recipe.each_kernel,
            _UPDATED.get(recipe.training.precision, "fp32"),
            recipe.training.seed,
            plan or Plan(),
        )

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else torch.bfloat16


def parameter_groups(module: nn.Module, spec: Spec) -> list[dict[str, Any]]:
    """The trainable parameters of `module` in groups for `build`: one for those that are trained from the same step
    on, at the same rate, with the same warm-up, and alike decay or do not.

    Biases, the parameters of normalisation modules (whose class name contains "Norm") and all other
    parameters of fewer than two dimensions do not decay; embeddings do. A tied parameter is listed once,
    under its first name. A group has the keys `params`, `names` (as in `named_parameters`), `tag`, `lr`,
    `lr_scale`, `opens` and `warmup` (see `update.set_learning_rates`), `place` (the parts of the model, in words)
    and `weight_decay`. Where all parameters are trained alike the tags are "decay" and "no_decay", else the place
    comes first. Groups that are trained earlier come first, then in the order of `named_parameters`.

    To be called before an engine flattens the parameters: it goes by their whole shapes.
    Raises UserError if no parameter is trainable.
    """
    members: dict[tuple[int, float, int], dict[str, list[tuple[str, nn.Parameter]]]] = {}
    for name, parameter, decays in _trainable(module):
        trained = spec.plan.of(name)
        kinds = members.setdefault(
            (trained.opens, trained.factor, trained.warmup), {"decay": [], "no_decay": []}
        )
        kinds["decay" if decays else "no_decay"].append((name, parameter))
    if not members:
        raise UserError("trainable: no parameter is left to train: freeze fewer, or unfreeze some")
    tags = _place_tags(members, spec.plan)
    settings = spec.settings
    return [
        {
            "params": [parameter for _, parameter in named],
            "names": [name for name, _ in named],
            "tag": kind if len(members) == 1 else f"{tags[key]}, {kind}",
            "place": tags[key],
            "lr": settings.learning_rate * key[1],
            "lr_scale": key[1],
            "opens": key[0],
            "warmup": key[2],
            "weight_decay": settings.weight_decay if kind == "decay" else 0.0,
        }
        for key, kinds in sorted(members.items(), key=lambda pair: pair[0][0])
        for kind, named in kinds.items()
        if named
    ]


def _place_tags(
    members: Mapping[tuple[int, float, int], Mapping[str, list[tuple[str, nn.Parameter]]]], plan: Plan
) -> dict[tuple[int, float, int], str]:
    """What people call each; a learning rate is added where two lie in the same parts of the model."""
    tags = {
        key: places(plan.of(name).place for named in kinds.values() for name, _ in named)
        for key, kinds in members.items()
    }
    alike = [tag for tag, times in Counter(tags.values()).items() if times > 1]
    return {key: f"{tag} × {key[1]:g}" if tag in alike else tag for key, tag in tags.items()}


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
