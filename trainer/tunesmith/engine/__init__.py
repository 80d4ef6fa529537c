"""The engines, and the choice among them."""

from __future__ import annotations

import os
import socket

import torch

from tunesmith.engine.base import Engine
from tunesmith.errors import UserError
from tunesmith.recipe import Recipe
from tunesmith.recipe.parallel import DDP, FSDP2, Auto, Single, Zero1, Zero2, Zero3


def device_type() -> str:
    """The accelerator's type where there is one, else "cpu". `TUNESMITH_DEVICE=cpu` keeps a run off the GPU."""
    if os.environ.get("TUNESMITH_DEVICE") == "cpu" or not torch.accelerator.is_available():
        return "cpu"
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type


def build_engine(recipe: Recipe) -> Engine:
    """The engine of `parallel.strategy` (`auto`, where nobody has settled it, is single for one process and ddp for
    several). A sharding engine that was started without a launcher is a world of one: offloading needs no second
    process."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    settings = recipe.parallel
    if isinstance(settings, Auto):
        chosen = Single(strategy="single") if world_size == 1 else DDP(strategy="ddp")
        settings = chosen.model_copy(update={"timeout": settings.timeout})
    _refuse_contradictions(recipe)
    if isinstance(settings, Single) and world_size != 1:
        raise UserError(f"parallel.strategy: single runs one process, but {world_size} were launched")
    if "WORLD_SIZE" not in os.environ:
        if isinstance(settings, DDP):
            raise UserError(
                "parallel.strategy: ddp needs a launcher: tunesmith train RECIPE --num-processes N"
            )
        if not isinstance(settings, Single):
            _world_of_one()
    kind = device_type()
    match settings:
        case Single():
            return alone()
        case DDP():
            from tunesmith.engine.ddp import DDPEngine

            return DDPEngine(kind, settings.timeout)
        case Zero1() | Zero2() | Zero3():
            from tunesmith.engine.zero import ZeroEngine

            return ZeroEngine(kind, settings)
        case FSDP2():
            from tunesmith.engine.fsdp2 import FSDP2Engine

            return FSDP2Engine(kind, settings)


def alone() -> Engine:
    """One process by itself, also where it is a rank of a run: for a model beside the one that is trained."""
    from tunesmith.engine.single import SingleEngine

    kind = device_type()
    if kind == "cpu":
        return SingleEngine(torch.device("cpu"))
    return SingleEngine(torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))))


def _world_of_one() -> None:
    """What a launcher would have set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _refuse_contradictions(recipe: Recipe) -> None:
    """An accelerate variable that says something else than the recipe would be ignored, or win, in silence."""
    no = {"false", "False", "0", ""}
    deepspeed = isinstance(recipe.parallel, Zero1 | Zero2 | Zero3)
    expected = {
        "ACCELERATE_MIXED_PRECISION": ({"no", recipe.training.precision}, "training.precision"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            {"1"},
            "training.global_batch_size (accumulation is derived)",
        ),
        "ACCELERATE_USE_DEEPSPEED": ({"true", "True", "1"} if deepspeed else no, "parallel.strategy"),
        "ACCELERATE_USE_FSDP": (no, "parallel.strategy"),
        "ACCELERATE_DYNAMO_BACKEND": ({"no", "NO"}, "the recipe, which does not compile"),
    }
    for name, (allowed, key) in expected.items():
        value = os.environ.get(name)
        if value is not None and value not in allowed:
            raise UserError(
                f"{name}={value} in the environment (or the accelerate config) contradicts {key}: unset it"
            )


__all__ = ["Engine", "alone", "build_engine", "device_type"]
