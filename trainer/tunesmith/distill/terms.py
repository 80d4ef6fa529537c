"""The terms of the loss that hold a student against its teachers. Σ over the units, divided by the normalizer alone;
several teachers count by their shares, which add up to 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from tunesmith.batch import IGNORED, Batch
from tunesmith.distill.divergence import Divergence, TopK
from tunesmith.distill.readings import Reading, Rows, Spans, Tokens, real_tokens
from tunesmith.errors import UserError
from tunesmith.fused_head import HeadOutput
from tunesmith_kernels import TeacherHidden, TeacherLogits, TeacherTopK

TEACHERS = "distill_teachers"
"""Among the outputs: what each teacher gave, a mapping under the names of the student's outputs."""

PAIRS = "distill_pairs"
"""Among the outputs: term → for each teacher [(student's, teacher's)], layer by layer."""


@dataclass(frozen=True, slots=True)
class TeacherOf:
    """How one teacher's classes are read: see `teacher.Known`."""

    share: float
    order: tuple[int, ...] | None = None
    vocab: int | None = None


@dataclass(frozen=True, slots=True)
class LogitsTerm:
    """Σ over units of Σ_k share_k · T²·D(teacher_k, student). Of several labels the mean over the labels of D between
    two Bernoulli distributions; of numbers the mean of the squared differences; of spans the mean of D of start and
    end, over the row's own positions."""

    name: str
    weight: float
    reading: Reading
    divergence: Divergence
    teachers: tuple[TeacherOf, ...]
    top_k: int | None = None
    bucket: bool = True

    def units(self, batch: Batch) -> int:
        return self.reading.units(batch)

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        found = [
            teacher.share * self._against(outputs, given, teacher, batch, normalizer)
            for teacher, given in zip(self.teachers, outputs[TEACHERS], strict=True)
        ]
        return torch.stack(found).sum()

    def _against(
        self, outputs: Any, given: Mapping[str, Any], teacher: TeacherOf, batch: Batch, normalizer: Tensor
    ) -> Tensor:
        match self.reading:
            case Tokens():
                return self._tokens(outputs, given, teacher, batch, normalizer)
            case Rows():
                return self._rows(outputs, given, teacher, batch) / normalizer
            case Spans():
                return self._spans(outputs, given, batch) / normalizer

    def _tokens(
        self, outputs: Any, given: Mapping[str, Any], teacher: TeacherOf, batch: Batch, normalizer: Tensor
    ) -> Tensor:
        assert isinstance(self.reading, Tokens)
        name, labels = self.reading.logits, self.reading.labels(batch)
        student: Tensor | HeadOutput = outputs[name]
        theirs: Tensor | HeadOutput | TopK = given[name]
        if self.reading.shifts(batch):
            student = student.without_last() if isinstance(student, HeadOutput) else student[:, :-1]
            if isinstance(theirs, HeadOutput):
                theirs = theirs.without_last()
            elif isinstance(theirs, Tensor):
                theirs = theirs[:, :-1]
        if isinstance(student, HeadOutput):
            return student.distillation(
                self._for_kernel(theirs, teacher),
                labels,
                normalizer=normalizer,
                divergence=self.divergence.kind,
                beta=self.divergence.beta,
                temperature=self.divergence.temperature,
            )
        assert not isinstance(theirs, HeadOutput)
        student = student[..., : teacher.vocab]
        found = self.divergence(student, self._classes(theirs, teacher, student))
        return found.where(labels != IGNORED, 0.0).sum() / normalizer

    def _for_kernel(
        self, theirs: Tensor | HeadOutput | TopK, teacher: TeacherOf
    ) -> TeacherHidden | TeacherLogits | TeacherTopK:
        if isinstance(theirs, HeadOutput):
            return theirs.as_teacher(teacher.vocab)
        if isinstance(theirs, Tensor) and self.top_k is not None:
            theirs = self._top(theirs[..., : teacher.vocab])
        if isinstance(theirs, TopK):
            return TeacherTopK(theirs.indices, theirs.log_probs, theirs.bucket, teacher.vocab)
        return TeacherLogits(theirs, teacher.vocab)

    def _top(self, logits: Tensor) -> TopK:
        assert self.top_k is not None
        return TopK.of(logits, self.top_k, self.divergence.temperature, bucket=self.bucket)

    def _classes(self, theirs: Tensor | TopK, teacher: TeacherOf, student: Tensor) -> Tensor | TopK:
        """The teacher's classes in the student's order."""
        if isinstance(theirs, TopK):
            return theirs
        theirs = theirs[..., : teacher.vocab]
        if teacher.order is not None:
            theirs = theirs[..., torch.tensor(teacher.order, device=theirs.device)]
        if theirs.shape != student.shape:
            raise UserError(
                f"distill: the teacher's logits are {[*theirs.shape]} beside {[*student.shape]} of the student: they "
                "do not predict the same"
            )
        return theirs if self.top_k is None else self._top(theirs)

    def _rows(self, outputs: Any, given: Mapping[str, Any], teacher: TeacherOf, batch: Batch) -> Tensor:
        assert isinstance(self.reading, Rows)
        student: Tensor = outputs[self.reading.logits]
        theirs = self._classes(given[self.reading.logits], teacher, student)
        if self.reading.kind == "one":
            found = self.divergence(student, theirs)
        else:
            assert isinstance(theirs, Tensor)
            if self.reading.kind == "several":
                found = self.divergence.bernoulli(student, theirs)
            else:
                found = (student.float() - theirs.float()).square().mean(dim=-1)
        return (found * batch.targets["row_mask"]).sum()

    def _spans(self, outputs: Any, given: Mapping[str, Any], batch: Batch) -> Tensor:
        padding = batch.inputs["attention_mask"] == 0
        ends = [
            self.divergence(
                outputs[f"{end}_logits"].float().masked_fill(padding, -torch.inf),
                given[f"{end}_logits"].float().masked_fill(padding, -torch.inf),
            )
            for end in ("start", "end")
        ]
        return (torch.stack(ends).mean(dim=0) * batch.targets["row_mask"]).sum()


def apart(student: Tensor, teacher: Tensor, loss: Literal["mse", "cosine"]) -> Tensor:
    """[..., width] twice → [...] fp32: the mean of the squared differences, or 1 − the cosine of the two."""
    student, teacher = _wide(student), _wide(teacher)
    if loss == "mse":
        return (student - teacher).square().mean(dim=-1)
    return 1 - torch.cosine_similarity(student, teacher, dim=-1)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True, slots=True)
class HiddenTerm:
    """Σ over the tokens that are no padding (its units) of the mean over the mapped layers of `apart`
    (Romero et al. 2015, Jiao et al. 2020: mse; Sanh et al. 2019: cosine)."""

    name: str
    weight: float
    shares: tuple[float, ...]
    loss: Literal["mse", "cosine"]
    stack: Literal["", "encoder", "decoder"] = ""

    def units(self, batch: Batch) -> int:
        return int(real_tokens(batch, self.stack).sum())

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        mask = real_tokens(batch, self.stack)
        pairs: Sequence[Sequence[tuple[Tensor, Tensor]]] = outputs[PAIRS][self.name]
        found = [
            share * torch.stack([apart(s, t, self.loss).where(mask, 0.0).sum() for s, t in layers]).mean()
            for share, layers in zip(self.shares, pairs, strict=True)
        ]
        return torch.stack(found).sum() / normalizer


@dataclass(frozen=True, slots=True)
class AttentionTerm:
    """Σ over the tokens that are no padding (its units) of the mean over the mapped layers and the heads of, between
    the teacher's attention a and the student's b from this token: kl, Σ_keys a·(log a − log b) (Wang et al. 2020,
    MiniLM); mse, Σ_keys (a − b)²."""

    name: str
    weight: float
    shares: tuple[float, ...]
    loss: Literal["kl", "mse"]
    stack: Literal["", "encoder", "decoder"] = ""

    def units(self, batch: Batch) -> int:
        return int(real_tokens(batch, self.stack).sum())

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        mask = real_tokens(batch, self.stack)
        pairs: Sequence[Sequence[tuple[Tensor, Tensor]]] = outputs[PAIRS][self.name]
        found = [
            share * torch.stack([self._layer(s, t).where(mask, 0.0).sum() for s, t in layers]).mean()
            for share, layers in zip(self.shares, pairs, strict=True)
        ]
        return torch.stack(found).sum() / normalizer

    def _layer(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[rows, heads, queries, keys] twice → [rows, queries]."""
        student, teacher = _wide(student), _wide(teacher)
        if self.loss == "mse":
            return (student - teacher).square().sum(dim=-1).mean(dim=1)
        tiny = torch.finfo(torch.float32).tiny
        found = teacher * (teacher.clamp_min(tiny).log() - student.clamp_min(tiny).log())
        return found.sum(dim=-1).mean(dim=1)


@dataclass(frozen=True, slots=True)
class EmbeddingTerm:
    """Σ over rows (its units) of `apart` between the pooled last hidden states (Reimers & Gurevych 2020: mse)."""

    name: str
    weight: float
    shares: tuple[float, ...]
    loss: Literal["cosine", "mse"]
    pooling: Literal["mean", "cls", "last"]
    stack: Literal["", "encoder"] = ""

    def units(self, batch: Batch) -> int:
        return batch.samples

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        tokens = batch.inputs["attention_mask"].bool()
        rows = torch.tensor([row >= 0 for row in batch.rows], device=tokens.device)
        pairs: Sequence[Sequence[tuple[Tensor, Tensor]]] = outputs[PAIRS][self.name]
        found = []
        for share, ((student, teacher),) in zip(self.shares, cast(Any, pairs), strict=True):
            one = apart(
                pooled(student, tokens, self.pooling), pooled(teacher, tokens, self.pooling), self.loss
            )
            found.append(share * one.where(rows, 0.0).sum())
        return torch.stack(found).sum() / normalizer


def pooled(hidden: Tensor, tokens: Tensor, pooling: Literal["mean", "cls", "last"]) -> Tensor:
    """hidden [rows, positions, width], tokens bool [rows, positions], padded on the right → [rows, width]."""
    if pooling == "cls":
        return hidden[:, 0]
    counts = tokens.sum(dim=1).clamp_min(1)
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), counts - 1]
    weights = tokens.to(hidden.dtype) / counts[:, None].to(hidden.dtype)
    return (hidden * weights[..., None]).sum(dim=1)
