"""The disk that a run's checkpoints will take."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tunesmith.averaging import state_bytes as average_bytes
from tunesmith.commands.findings import Finding, error, fine
from tunesmith.engine import Engine
from tunesmith.recipe import Recipe
from tunesmith.tracking.text import size


def save_count(recipe: Recipe, steps: int, steps_per_epoch: int, has_eval: bool) -> int:
    """At most: what `save_steps` asks for, the last step, and each evaluation that could be the best."""

    def times(every: int | str | None) -> int:
        return 0 if every is None else steps // (steps_per_epoch if every == "epoch" else int(every))

    best = has_eval and recipe.checkpoint.final == "best"
    return times(recipe.checkpoint.save_steps) + 1 + (times(recipe.evaluation.eval_steps) if best else 0)


def disk_finding(recipe: Recipe, run_dir: Path, engine: Engine, saves: int, *, keeps_best: bool) -> Finding:
    """The most that lies on the disk at once: the kept checkpoints, the best one, the one that is being written, and
    final/."""
    weights = sum(value.nbytes for value in engine.train_module.model.state_dict().values())
    state = _tensor_bytes(engine.optimizer_state())
    if recipe.averaging is not None:
        state += average_bytes(
            sum(p.numel() for p in engine.train_module.model.parameters() if p.requires_grad)
        )
    kept = min(saves, (recipe.checkpoint.save_total_limit or saves) + 1 + keeps_best)
    needed = kept * (weights + state) + weights
    there = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    text = f"up to {size(needed)} ({kept} × {size(weights + state)} of checkpoints, and final/), {size(free)} free"
    fix = "lower checkpoint.save_total_limit, make room, or set output_dir"
    return fine("disk", text) if needed < free else error("disk", text, fix, 3)


def _tensor_bytes(state: Any) -> int:
    match state:
        case torch.Tensor():
            return state.nbytes
        case Mapping():
            return sum(_tensor_bytes(value) for value in state.values())
        case list() | tuple():
            return sum(_tensor_bytes(value) for value in state)
        case _:
            return 0
