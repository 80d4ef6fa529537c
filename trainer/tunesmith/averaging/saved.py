"""The average of the weights in a checkpoint, for a model that is not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tunesmith.averaging.average import Average
from tunesmith.checkpoint.run_state import saved_part

_PREFIX = "model."  # a parameter's name in the model → in the module that the engine trained


@torch.no_grad()
def put_average(model: Any, path: Path, names: Mapping[str, str]) -> None:
    """The checkpoint's average in the place of the weights that were trained, whole on one device; the weights stay
    where it had not begun. `names`: of a parameter in the checkpoint, where that is not the model's own."""
    saved = saved_part(path, Average.name)
    if saved is None:
        return
    there = saved.names()
    for own, parameter in model.named_parameters(remove_duplicate=False):
        name = _PREFIX + names.get(own, own)
        if name in there:
            parameter.copy_(saved.whole(name, "average"))
