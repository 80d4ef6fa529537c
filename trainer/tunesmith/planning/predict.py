"""The peak that the start-up report predicts for a run: the plan's closed form for what was built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError
from tunesmith.planning.beside import per_weight_from_the_start
from tunesmith.planning.inspect import inspect
from tunesmith.planning.memory import PARTS, Setup, estimate
from tunesmith.recipe import Recipe
from tunesmith.recipe.optim import SGD
from tunesmith.unpartitioned import unpartitioned

# what tracing foreign code without data may raise: the run does not need the prediction
_FAULTS = (UserError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Built:
    """What a run has found out when it reports: the model's `config`, the `world_size` and `device` type, the rows of
    its largest micro-batch, the tokens of its `longest` row (None: data.max_length), and `process_peak`: bytes, the
    most that the process has held when one forward and backward of that micro-batch are done, and no step yet (0 on
    an accelerator, where the peak is the allocator's)."""

    config: Any
    world_size: int
    device: str
    rows: int
    longest: int | None = None
    process_peak: int = 0


def predict_peak(recipe: Recipe, base: Path, built: Built) -> dict[str, Any]:
    """`bytes` of the peak on one device, `moment` and `parts` of it in bytes, `process_bytes`: what the process holds
    beside (libraries, and what its allocator keeps), as that one backward showed; or `bytes` None and `why`.
    `recipe.parallel` is a strategy, not auto."""
    try:
        with unpartitioned():
            return _predicted(recipe, base, built)
    except _FAULTS as error:
        return {"bytes": None, "why": f"{type(error).__name__}: {error}".splitlines()[0]}


def _predicted(recipe: Recipe, base: Path, built: Built) -> dict[str, Any]:
    found = inspect(recipe, base, config=built.config)
    if built.longest is not None and not found.workload.shape.target_length:
        shape = replace(found.workload.shape, length=built.longest)
        found.workload = replace(found.workload, shape=shape)
    checkpointing = recipe.model.gradient_checkpointing
    setup = Setup(recipe.parallel, built.world_size, built.rows, checkpointing, built.device)
    variant = found.variant(recipe.parallel, checkpointing, built.device)
    profile = found.profile(variant)
    memory = estimate(found.workload, setup, profile)
    there = replace(found.workload.beside, per_weight=per_weight_from_the_start(recipe))
    stateless = replace(found.workload, optim=SGD(name="sgd", learning_rate=1.0), beside=there)
    before_a_step = estimate(stateless, setup, profile).total
    beside = max(0, built.process_peak - round(before_a_step))
    return {
        "bytes": round(memory.total) + beside,
        "moment": memory.moment,
        "parts": {name: round(getattr(memory, name)) for name in PARTS},
        "process_bytes": beside,
    }
