"""The diagonal of the Fisher information of a model, which says how much each weight counts for what it can do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tunesmith.batch import IGNORED, Batch
from tunesmith.data.order import Salt, raw
from tunesmith.data.table import Table
from tunesmith.errors import UserError
from tunesmith.objectives import Objective

_EPOCH = 2**31 - 2  # what a row is drawn with here: always the same masks


def fisher(
    model: nn.Module,
    objective: Objective,
    table: Table,
    rows: Iterable[int],
    labels: Literal["model", "data"],
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """F_i = mean over `rows` of (∂ log p(y | x) / ∂w_i)², by parameter name: fp32, on `device`. y is drawn from
    p(· | x) (`labels: model`), or what the data say (`data`: the empirical Fisher information, see Kunstner et al.
    2019 for the difference). The log-likelihood of a row of several units is their sum. The model is in evaluation
    mode; one row after the other, for squares of sums are no sums of squares.

    Raises UserError where the model's answers cannot be drawn: numbers and spans."""
    model.to(device).eval()
    named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    for _, parameter in named:
        parameter.requires_grad_(True)
    found = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named}
    one = torch.ones((), device=device)
    count = 0
    for row in rows:
        count += 1
        drawn = objective.draw(table.row(row), (seed, _EPOCH, row, Salt.ROW))
        batch = objective.collate([drawn], [row]).to(device)
        outputs = objective.outputs(model, batch)
        if labels == "model":
            key = int(raw(1, seed, _EPOCH, row, Salt.ROW_MODEL)[0] >> 1)
            batch = answered(objective, outputs, batch, torch.Generator(device).manual_seed(key))
        loss = torch.stack([term.weight * term(outputs, batch, one) for term in objective.terms]).sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        for name, parameter in named:
            if parameter.grad is not None:
                found[name] += parameter.grad.float().square()
    model.zero_grad(set_to_none=True)
    return {name: total / count for name, total in found.items()}


@torch.no_grad()
def answered(objective: Objective, outputs: Any, batch: Batch, generator: torch.Generator) -> Batch:
    """The batch with labels drawn from what the model predicts, wherever it has one."""
    logits, labels = outputs.get("logits"), batch.targets.get("labels")
    if not isinstance(logits, Tensor) or labels is None:
        raise UserError("remember.ewc.labels: model cannot draw this objective's answers: set labels: data")
    if labels.is_floating_point():
        if getattr(objective, "problem", None) != "multi_label":
            raise UserError("remember.ewc.labels: model draws no numbers (regression): set labels: data")
        drawn = torch.rand(logits.shape, generator=generator, device=logits.device) < logits.float().sigmoid()
        return replace(batch, targets={**batch.targets, "labels": drawn.to(labels.dtype)})
    shifts = any(getattr(term, "shift", False) for term in objective.terms) and not batch.aligned
    read, asked = (logits[:, :-1], labels[:, 1:]) if shifts else (logits, labels)
    flat = read.float().reshape(-1, read.shape[-1]).softmax(-1)
    answers = torch.multinomial(flat, 1, generator=generator).view(asked.shape)
    answers = torch.where(asked == IGNORED, asked, answers)
    whole = torch.cat([labels[:, :1], answers], dim=1) if shifts else answers
    return replace(batch, targets={**batch.targets, "labels": whole})
