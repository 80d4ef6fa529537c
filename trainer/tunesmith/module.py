"""The one module that an engine wraps: backbone, head and the terms of the loss.

The hidden states meet the head inside it, so that a sharding engine gathers the head where it must, and no logits
leave it. Its forward has a mode; every rank runs the same mode at the same time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from math import prod
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.fused_head import FusedHead
from tunesmith.objectives.base import Objective
from tunesmith.parts import ForwardPart
from tunesmith.terms import Term
from tunesmith.trainable.modes import settle_modes

Precision = Literal["fp32", "bf16", "fp16"]

AUTOCAST: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


FACTORS = "tunesmith_factors"
"""Under this name a part of the forward gives factors on the terms of the loss: [terms], with a gradient."""


class Loss(NamedTuple):
    """`total` is what backward takes: Σ weight × sum / normalizer over the terms (0-dim fp32). `parts` are the
    terms' sum / normalizer, detached [terms]. A tuple: sharding engines look for the tensors in what a forward
    returns, to be told when its backward begins."""

    total: Tensor
    parts: Tensor


class Predicted(NamedTuple):
    """`sums` are the terms' sums over the batch [terms], `predictions` the objective's, one per row."""

    sums: Tensor
    predictions: list[Any]


class Compared(NamedTuple):
    """The terms' sums over a batch [terms], by the fused head and from the model's own logits; `problem` where there
    is no fused one."""

    fused: Tensor | None
    own: Tensor
    problem: str | None


class TrainModule(nn.Module):
    """`forward(batch, "loss", normalizers, weights=…)` → Loss; `forward(batch, "predict")` → Predicted;
    `forward(batch, "generate", options=…)` → generated token ids [rows, new tokens]; `forward(batch, "logits")` → the
    model's own without autocast, fp32 [rows, positions, classes]; `forward(batch, "compare")` → Compared. With a
    `fused_head`, losses are computed from the hidden states and the head. `terms`: all that the training's loss has,
    the objective's first, each as `own` makes it; `parts`: what strategies add to its forward. Evaluations have the
    objective's terms alone, as they are."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        precision: Precision,
        terms: Sequence[Term] = (),
        parts: Sequence[ForwardPart] = (),
        own: Callable[[Term], Term] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.parts = tuple(parts)
        self._added_terms = tuple(terms)
        self._own = own
        self.precision: Precision = precision
        self.untouched: tuple[str, ...] = ()
        self.fused_head: FusedHead | None = None

    def train(self, mode: bool = True) -> TrainModule:
        """Frozen parts of the model stay in evaluation mode: see `settle_modes`."""
        super().train(mode)
        settle_modes(self.model)
        return self

    def forward(
        self,
        batch: Batch,
        mode: Literal["loss", "predict", "generate", "logits", "compare"] = "loss",
        normalizers: Tensor | None = None,
        options: Mapping[str, Any] | None = None,
        weights: Tensor | None = None,
    ) -> Loss | Predicted | Compared | Tensor:
        device = next(iter(batch.inputs.values())).device
        if mode == "loss":
            assert normalizers is not None
            return self._loss(batch, normalizers, weights)
        dtype = AUTOCAST.get(self.precision)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None and mode != "logits"):
            if mode == "generate":
                return self._generate(batch, options or {})
            head = None if mode == "logits" else self.fused_head
            with nullcontext() if head is None else head.standing_in():
                outputs = self.objective.outputs(self.model, batch)
            own = self.objective.outputs(self.model, batch) if mode == "compare" else None
        if mode == "logits":
            return cast(Tensor, outputs["logits"]).float()
        if own is not None:
            return self._compare(outputs, own, batch)
        asked = self.objective.of(batch.task)
        ones = torch.ones(len(asked.terms), device=device)
        return Predicted(
            torch.stack(_parts(asked.terms, outputs, batch, ones)), asked.predict(outputs, batch)
        )

    @property
    def terms(self) -> tuple[Term, ...]:
        own = self.objective.terms
        return (own if self._own is None else tuple(map(self._own, own))) + self._added_terms

    def _loss(self, batch: Batch, normalizers: Tensor, weights: Tensor | None) -> Loss:
        device, dtype = normalizers.device, AUTOCAST.get(self.precision)
        views = prod(part.views for part in self.parts)
        batch = batch.repeated(views)
        options = {name: value for part in self.parts for name, value in part.options.items()}
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            with ExitStack() as around:
                if self.fused_head is not None:
                    around.enter_context(self.fused_head.standing_in())
                for part in self.parts:
                    around.enter_context(part.around(batch))
                outputs: Mapping[str, Any] = self.objective.outputs(self.model, batch, **options)
            for part in self.parts:
                outputs = {**outputs, **part.add(self, outputs, batch)}
        weighted = outputs.get(FACTORS, 1.0)
        # a term sums over all copies of a row, of which the normalizer counts one
        parts = torch.stack(_parts(self.terms, outputs, batch, normalizers * views))
        if weights is None:
            weights = torch.tensor([term.weight for term in self.terms], device=device)
        return Loss((weighted * weights * parts).sum() + self._touch(), parts.detach())

    def _compare(self, fused: Mapping[str, Any], own: Mapping[str, Any], batch: Batch) -> Compared:
        terms = self.objective.of(batch.task).terms
        ones = torch.ones(len(terms), device=next(iter(batch.inputs.values())).device)
        expected = torch.stack(_parts(terms, own, batch, ones))
        try:
            return Compared(torch.stack(_parts(terms, fused, batch, ones)), expected, None)
        except ValueError as error:
            return Compared(None, expected, str(error))

    def _touch(self) -> Tensor | float:
        # DDP and FSDP2 wait for a gradient of every trainable parameter, also of those a loss does not use
        if not self.untouched:
            return 0.0
        parameters = dict(self.named_parameters())
        return torch.stack([parameters[name].view(-1)[:1].sum() for name in self.untouched]).sum() * 0.0

    def _generate(self, batch: Batch, options: Mapping[str, Any]) -> Tensor:
        generated = self.model.generate(**batch.inputs, **options)  # pyright: ignore[reportCallIssue]
        encoder_decoder = bool(getattr(self.model.config, "is_encoder_decoder", False))
        start = 1 if encoder_decoder else batch.inputs["input_ids"].shape[1]
        return generated[:, start:]


def _parts(
    terms: Sequence[Term], outputs: Mapping[str, Any], batch: Batch, normalizers: Tensor
) -> list[Tensor]:
    return [term(outputs, batch, normalizers[i]) for i, term in enumerate(terms)]
