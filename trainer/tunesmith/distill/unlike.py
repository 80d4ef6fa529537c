"""Teachers with other tokens than the student's: their distributions are compared without their classes' names, where
both have read the same text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.data.table import Table
from tunesmith.distill.teacher import Known, teacher_facts
from tunesmith.engine import Engine
from tunesmith.engine.companion import CompanionSource, companion
from tunesmith.fused_head import HeadOutput
from tunesmith.module import TrainModule
from tunesmith.objectives.base import pad
from tunesmith.parts import ForwardPart

UNLIKE = "distill_unlike"
"""Among the outputs: the teacher's logits fp32 [places, classes]."""


def uld(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Universal logit distillation (Boizard et al. 2024): Σ_i |p_(i) − q_(i)| of the probabilities p = softmax(t/T) and
    q = softmax(z/T), each sorted from the greatest down, the shorter filled up with zeros; the Wasserstein distance
    where moving mass costs the same between any two classes. [..., V] and [..., V'] → [...], from 0 to 2."""
    q = torch.softmax(_wide(student) / temperature, dim=-1).sort(dim=-1, descending=True).values
    p = torch.softmax(_wide(teacher) / temperature, dim=-1).sort(dim=-1, descending=True).values
    short = q.shape[-1] - p.shape[-1]
    return (F.pad(p, (0, max(0, short))) - F.pad(q, (0, max(0, -short)))).abs().sum(dim=-1)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True, slots=True)
class UnlikeTerm:
    """Σ over places of ULD(teacher, student). Its units, which the normalizer counts, are the places where a token of
    both tokenizers ends and the student's next token is labelled."""

    name: str
    weight: float
    temperature: float
    table: Table

    def units(self, batch: Batch) -> int:
        return sum(len(self.table.value("student_at", row)) for row in batch.rows if row >= 0)

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        logits: Tensor | HeadOutput = outputs["logits"]
        theirs: Tensor = outputs[UNLIKE]
        rows, places = places_of(self.table, batch, "student_at", theirs.device)
        own = logits.at(rows, places) if isinstance(logits, HeadOutput) else logits[rows, places]
        return uld(own, theirs, self.temperature).sum() / normalizer


def places_of(table: Table, batch: Batch, column: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(row of the batch, position) of every place: int64 [places] twice."""
    found = [
        (i, int(place)) for i, row in enumerate(batch.rows) if row >= 0 for place in table.value(column, row)
    ]
    rows, places = torch.tensor(found, dtype=torch.int64, device=device).reshape(-1, 2).unbind(1)
    return rows, places


@dataclass
class UnlikePart(ForwardPart):
    """Runs the teacher on its own tokens of the batch's rows."""

    known: Known
    source: CompanionSource
    table: Table
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    _module: nn.Module | None = None

    def begin(self, engine: Engine) -> None:
        self._module = companion(engine, self.source, sharded=self.known.settings.placement == "sharded")
        self.facts["teachers"] = [teacher_facts(self._module, self.known)]
        self.facts["aligned_places"] = self.table.meta["places"]

    def add(self, module: TrainModule, outputs: Mapping[str, Any], batch: Batch) -> Mapping[str, Any]:
        assert self._module is not None
        device = batch.inputs["input_ids"].device
        # a filler asks about any row, and reads nothing of the answer
        ids = [self.table.value("teacher_ids", max(row, 0)) for row in batch.rows]
        mask = pad([[1] * len(one) for one in ids], 0).to(device)
        padded = pad(ids, self.known.tokenizer.pad_token_id or 0).to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            logits: Tensor = self._module(input_ids=padded, attention_mask=mask, use_cache=False).logits
        rows, places = places_of(self.table, batch, "teacher_at", device)
        return {UNLIKE: logits[rows, places].float()}
