"""Which parameters are trained."""

from __future__ import annotations

import fnmatch
from typing import Any

from torch import nn

from tunesmith.errors import UserError
from tunesmith.recipe.trainable import Trainable
from tunesmith.shapes import whole_numel


def apply_trainable(model: nn.Module, settings: Trainable) -> dict[str, Any]:
    """Freezes and unfreezes by name, in place. A pattern that matches no parameter is an error. Returns facts."""
    names = dict(model.named_parameters())
    for key, patterns, wanted in (("freeze", settings.freeze, False), ("unfreeze", settings.unfreeze, True)):
        for pattern in patterns:
            matched = fnmatch.filter(names, pattern)
            if not matched:
                raise UserError(
                    f"trainable.{key}: {pattern!r} matches no parameter; the first is {next(iter(names))}"
                )
            for name in matched:
                names[name].requires_grad_(wanted)
    trained = sum(whole_numel(p) for p in names.values() if p.requires_grad)
    if trained == 0:
        raise UserError("trainable.freeze: nothing is left to train")
    return {"trainable_parameters": trained, "total_parameters": sum(whole_numel(p) for p in names.values())}
