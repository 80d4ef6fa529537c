"""Whether a run's loss is computed from the hidden states and the head, without logits: chosen from the model, then
held against the model's own logits before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tunesmith.batch import IGNORED, Batch
from tunesmith.data.stream import Stream
from tunesmith.engine import Engine
from tunesmith.errors import MachineError
from tunesmith.fused_head import FusedHead
from tunesmith.module import AUTOCAST, Compared
from tunesmith.objectives import Objective
from tunesmith.recipe import Recipe
from tunesmith.terms import TokenCrossEntropy
from tunesmith_kernels.linear_loss.backends import obstacle, path_for

# relative, of one batch's loss: fp32 agrees to 1e-6, 16 bits round the logits in another order
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}


def choose_head(recipe: Recipe, model: nn.Module, objective: Objective) -> FusedHead | str:
    """The head whose loss the kernel can compute, or why there is none, in one clause. To be called before an engine
    prepares the model, and hangs hooks on it."""
    asked = recipe.each_kernel.linear_cross_entropy
    if asked == "reference":
        return "the recipe asks for it"
    if recipe.tasks:
        return "there are several tasks"
    if not any(isinstance(term, TokenCrossEntropy) for term in objective.terms):
        return "the loss is not a cross-entropy over tokens"
    if type(objective).predict is not Objective.predict:
        return "the objective's metrics need the logits"
    if getattr(recipe.parallel, "tensor_parallel_size", 1) > 1:
        return "tensor parallelism spreads the head's classes over the ranks"
    find: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if head is None:
        return f"{type(model).__name__} has no output embeddings"
    if type(head) is not nn.Linear:
        return f"the head is {type(head).__name__}, not a plain Linear"
    if head._forward_hooks or head._forward_pre_hooks:  # pyright: ignore[reportPrivateUsage]
        return "the head has hooks of its own"
    return FusedHead(head, None if asked == "auto" else asked)


def fuse_loss(engine: Engine, stream: Stream, head: FusedHead | str) -> dict[str, str]:
    """Gives the engine's module the head, if the losses of a few rows are those from the model's own logits, and tells
    what computes the loss and why. Called by all ranks, which decide alike. Raises MachineError where the recipe asks
    for a path that cannot run here."""
    if isinstance(head, str):
        return {"linear_cross_entropy": f"reference: {head}"}
    module = engine.train_module
    dtype = AUTOCAST.get(module.precision, torch.float32)
    if head.backend is not None and (reason := obstacle(head.backend, engine.device, dtype)):
        raise MachineError(f"kernels.linear_cross_entropy: {head.backend} cannot run here: {reason}")
    module.fused_head = head
    problem = _disagreement(engine, stream, _TOLERANCE[dtype])
    if problem is not None:
        module.fused_head = None
        return {"linear_cross_entropy": f"reference: {problem}"}
    path, why = path_for(engine.device, dtype)
    return {
        "linear_cross_entropy": f"{path}: {why}"
        if head.backend is None
        else f"{head.backend}: the recipe asks for it"
    }


def _beginning(batch: Batch) -> Batch:
    """At most 128 positions, for the check makes whole logits, where the run may have memory for none; all of them
    labelled, since an answer may begin behind them."""
    inputs, targets = (
        {k: v[:, :128] if v.ndim == 2 else v for k, v in group.items()}
        for group in (batch.inputs, batch.targets)
    )
    labels = targets["labels"]
    return replace(
        batch, inputs=inputs, targets={**targets, "labels": labels.masked_fill(labels == IGNORED, 1)}
    )


def _disagreement(engine: Engine, stream: Stream, tolerance: float) -> str | None:
    """What is wrong with the fused loss of two short rows, on any rank."""
    by_length = stream.dataset.table.lengths().argsort(kind="stable")
    rows = [int(row) for row in by_length[len(by_length) // 4 :][:2]]
    batch = engine.part(_beginning(stream.batch([[row] for row in rows], 0, rows[0])))
    engine.module.eval()
    with torch.no_grad():
        found: Compared = engine.forward(batch, "compare")
    engine.module.train()
    problem = found.problem
    if found.fused is not None:
        apart = float(((found.fused - found.own).abs() / found.own.abs().clamp_min(1e-6)).max())
        if not apart <= tolerance:
            problem = f"it disagreed with the model's own logits by {apart:.1e} on the first rows"
    return next((told for told in engine.gather(problem) if told is not None), None)
