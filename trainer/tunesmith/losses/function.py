"""A loss of the user's own: a Python function, found, and tried on made-up units, before anything is trained."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import UserError
from tunesmith.recipe.losses import Function
from tunesmith.recipe.paths import function_file

KEY = "objective.loss.function"
# what a person's own function may raise
_FAULTS = (ArithmeticError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class UserLoss:
    """`function(logits, labels, **options)`, with `mask` where it takes one → [units]. Where mask is false there is no
    label, and what the function returns there is not read; the label that stands there is 0."""

    function: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    takes_mask: bool = False

    def __call__(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        more = {"mask": mask} if self.takes_mask else {}
        return self.function(logits, labels, **more, **self.options)


def load_function(settings: Function) -> UserLoss:
    """Raises UserError where there is none, or it cannot be called as losses are."""
    where, _, name = settings.function.rpartition(":")
    found: Any = _file_module(Path(where)) if where.endswith(".py") else _module(where)
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{KEY}: {where} has no {name}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{KEY}: {settings.function} is no function but {type(found).__name__}")
    if settings.sha256 not in (None, digest(settings)):
        raise UserError(
            f"{KEY}: {where} is not what it was when the run started (objective.loss.sha256): restore it, or start a "
            "new run"
        )
    return UserLoss(found, settings.options, _takes_mask(found, settings))


def digest(settings: Function) -> str:
    """Of the file that holds the function. Raises UserError where it cannot be read."""
    path = function_file(settings.function)
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{KEY}: {path} cannot be read: {error.strerror}") from None


def _file_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{KEY}: there is no file {path}")
    name = f"tunesmith_loss_{sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{KEY}: {path} cannot be imported: {error}") from error
    return module


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{KEY}: {name} cannot be imported: {error}") from error


def _takes_mask(function: Callable[..., Any], settings: Function) -> bool:
    signature = inspect.signature(function)
    names = {"logits": None, "labels": None}
    takes = "mask" in signature.parameters
    try:
        signature.bind(**names, **({"mask": None} if takes else {}), **settings.options)
    except TypeError as error:
        raise UserError(
            f"{KEY}: {settings.function}{signature} cannot be called with logits, labels and the options "
            f"{', '.join(settings.options) or '(none)'}: {error}"
        ) from None
    return takes


def try_out(loss: UserLoss, outputs: int, labels: Tensor) -> None:
    """Calls it with `labels` (units first) and logits [units, outputs]. Raises UserError where it does not return a
    loss for each unit that has a gradient and does not change with the units beside it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(labels), outputs, generator=generator, requires_grad=True)
    mask = torch.ones(len(labels), dtype=torch.bool)
    try:
        found: Any = loss(logits, labels, mask)
    except _FAULTS as error:
        raise UserError(
            f"{KEY}: fails on logits {list(logits.shape)} and labels {list(labels.shape)}: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    if not isinstance(found, Tensor) or found.shape != mask.shape:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(
            f"{KEY}: for logits {list(logits.shape)} and labels {list(labels.shape)} it must return [{len(labels)}], a "
            f"loss for each, not {shape}; do not sum or average"
        )
    if not found.is_floating_point() or not found.requires_grad:
        raise UserError(f"{KEY}: what it returns has no gradient")
    alone = [loss(logits[i : i + 1], labels[i : i + 1], mask[i : i + 1]) for i in range(len(labels))]
    if not torch.allclose(found, torch.cat(alone), rtol=1e-4, atol=1e-6, equal_nan=True):
        raise UserError(
            f"{KEY}: a loss changes with the rows beside it (or by chance): the sum over a batch would hang on how the "
            "batch is split"
        )
