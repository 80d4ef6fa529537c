"""The engines, and the choice among them."""

from __future__ import annotations

import os

import torch

from tunesmith.engine.base import Engine
from tunesmith.errors import UserError
from tunesmith.recipe import Recipe


def device_type() -> str:
    """The accelerator's type where there is one, else "cpu". `TUNESMITH_DEVICE=cpu` keeps a run off the GPU."""
    if os.environ.get("TUNESMITH_DEVICE") == "cpu" or not torch.accelerator.is_available():
        return "cpu"
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type


def build_engine(recipe: Recipe) -> Engine:
    """The engine of `parallel.strategy`; `auto` is single for one process, ddp for several."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    strategy = recipe.parallel.strategy
    if strategy == "auto":
        strategy = "single" if world_size == 1 else "ddp"
    _refuse_contradictions(recipe)
    match strategy:
        case "single":
            if world_size != 1:
                raise UserError(f"parallel.strategy: single runs one process, but {world_size} were launched")
            from tunesmith.engine.single import SingleEngine

            kind = device_type()
            return SingleEngine(torch.device(kind, 0) if kind != "cpu" else torch.device("cpu"))
        case "ddp":
            if "WORLD_SIZE" not in os.environ:
                raise UserError(
                    "parallel.strategy: ddp needs a launcher: tunesmith train RECIPE --num-processes N"
                )
            from tunesmith.engine.ddp import DDPEngine

            return DDPEngine(device_type(), recipe.parallel.timeout)


def _refuse_contradictions(recipe: Recipe) -> None:
    """An accelerate variable that says something else than the recipe would be ignored, or win, in silence."""
    expected = {
        "ACCELERATE_MIXED_PRECISION": ({"no", recipe.training.precision}, "training.precision"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            {"1"},
            "training.global_batch_size (accumulation is derived)",
        ),
        "ACCELERATE_USE_DEEPSPEED": ({"false", "False", "0", ""}, "parallel.strategy"),
        "ACCELERATE_USE_FSDP": ({"false", "False", "0", ""}, "parallel.strategy"),
        "ACCELERATE_DYNAMO_BACKEND": ({"no", "NO"}, "the recipe, which does not compile"),
    }
    for name, (allowed, key) in expected.items():
        value = os.environ.get(name)
        if value is not None and value not in allowed:
            raise UserError(
                f"{name}={value} in the environment (or the accelerate config) contradicts {key}: unset it"
            )


__all__ = ["Engine", "build_engine", "device_type"]
