"""What `parallel.strategy: auto` means for a run."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch
from pydantic import TypeAdapter

from tunesmith.engine import device_type
from tunesmith.errors import UserError
from tunesmith.planning.choose import choose_strategy
from tunesmith.preflight.agree import Preflight
from tunesmith.recipe import Recipe
from tunesmith.recipe.parallel import DDP, Auto, Parallel, Single

_WHOLE = {"adafactor", "adamw_8bit", "lion_8bit"}  # optimizers that no shard boundary suits (recipe/rules.py)

_PARALLEL: TypeAdapter[Parallel] = TypeAdapter(Parallel)


def settle(recipe: Recipe, base: Path, preflight: Preflight | None) -> tuple[Recipe, str]:
    """The recipe with its strategy settled, and why: before the process group is made, rank 0 chooses by the memory
    of its device, and tells the others."""
    if not isinstance(recipe.parallel, Auto):
        return recipe, "asked for"
    if preflight is None:
        chosen, why = _choose(recipe, base)
    elif preflight.meeting.is_first:
        chosen, why = _choose(recipe, base)
        preflight.meeting.tell("strategy", [chosen.model_dump(), why])
    else:
        said, why = preflight.meeting.hear("strategy")
        chosen = _PARALLEL.validate_python(said)
    settled = chosen.model_copy(update={"timeout": recipe.parallel.timeout})
    return recipe.model_copy(update={"parallel": settled}), why


def _choose(recipe: Recipe, base: Path) -> tuple[Parallel, str]:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Single(strategy="single"), "auto: one process"
    if recipe.optim.name in _WHOLE:
        return DDP(strategy="ddp"), f"auto: {recipe.optim.name} needs whole matrices"
    kind = device_type()
    try:
        seen = next(iter(recipe.views.values()))  # of several tasks the first: the backbone is what weighs
        return choose_strategy(seen, world_size, _device_memory(kind), base, kind)
    except (
        UserError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        # the estimate traces foreign code without data: where it cannot, the run must not fail, and says so
        return DDP(
            strategy="ddp"
        ), f"auto: no estimate could be made ({type(error).__name__}: {error}), so ddp"


def _device_memory(kind: str) -> int:
    """Bytes that one rank can have."""
    if kind == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return int(psutil.virtual_memory().total) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
