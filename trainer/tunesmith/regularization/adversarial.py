"""Adversarial training on the embeddings (`regularization.adversarial`): a row's embedded tokens are moved to where its
loss is higher, and the model is trained on both.

With x the embedded tokens of a row, g the loss's gradient by them and ‖·‖ the L2 norm over all of the row's tokens (not
the padding; of a packed row, each sequence by itself):

    fgm (Miyato et al. 2017):  δ = epsilon · g / ‖g‖
    pgd (Madry et al. 2018):   δ₀ = 0,  δₖ = Π(δₖ₋₁ + step_size · g(x + δₖ₋₁) / ‖g(x + δₖ₋₁)‖),  Π back to ‖δ‖ ≤ epsilon

    loss = (1 − weight) · L(x) + weight · mean over k of L(x + δₖ)        (Goodfellow et al. 2015; fgm has one k)

All passes add their gradient: a pass that finds the next δ trains as well, as in FreeLB (Zhu et al. 2020), so that pgd
of n steps takes n + 1 passes. Each draws dropout of its own. The loss in the log is the whole one. The perturbation is
added to what the token embedding puts out (in an encoder-decoder, the encoder's), before positions are."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.errors import UserError
from tunesmith.parts import ForwardPart, Window
from tunesmith.recipe.regularization import FGM, PGD

_KEY = "regularization.adversarial"


class Perturbation(ForwardPart):
    """What is added to the embeddings of the forward that comes next; nothing unless a micro-step is about to.

    `delta`: fp32 [rows, positions, width], with the gradient that the last backward left; None: zeros, made when the
    embeddings are known. `batch`: what that forward saw, with all views of its rows."""

    def __init__(self, model: Any) -> None:
        self.active = False
        self.delta: Tensor | None = None
        self.batch: Batch | None = None
        self._reading = self._reached = False
        reader = _reader(model)
        embedding: Any = reader.get_input_embeddings()
        if not isinstance(embedding, nn.Module):
            raise UserError(f"{_KEY}: {type(model).__name__} has no token embeddings: leave it out")
        # a decoder may read the same embedding: only what the reader embeds is meant
        reader.register_forward_pre_hook(self._begin)
        embedding.register_forward_hook(self._add)
        reader.register_forward_hook(self._end)

    @contextmanager
    def around(self, batch: Batch) -> Generator[None]:
        self._reached, self.batch = False, batch
        yield
        if self.active and not self._reached:
            raise UserError(
                f"{_KEY}: the model is trained without its own token embedding being read: leave it out"
            )

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._reading = self.active

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._reading = False

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self._reading:
            return None
        self._reached = True
        if self.delta is None:
            self.delta = torch.zeros(output.shape, device=output.device)
        self.delta.requires_grad_(True)
        return output + self.delta.to(output.dtype)


def _reader(model: Any) -> Any:
    """The backbone, inside any adapters; its encoder, where it has a decoder too."""
    from transformers import PreTrainedModel

    inside: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    base = inside.base_model
    encoder = getattr(base, "encoder", None)
    return encoder if isinstance(encoder, PreTrainedModel) else base


class Adversarial:
    """A `MicroStep` of one pass over the rows as they are and one or more over perturbed ones."""

    def __init__(self, settings: FGM | PGD, perturbation: Perturbation) -> None:
        self.settings = settings
        self.perturbation = perturbation

    def __call__(self, window: Window, batch: Batch, last: bool) -> Tensor:
        weight, there = self.settings.weight, self.perturbation
        steps = self.settings.steps if isinstance(self.settings, PGD) else 1
        there.active, there.delta = True, None
        try:
            parts = self._pass(window, batch, 1.0 - weight, last=False)
            for step in range(1, steps + 1):
                self._climb()
                parts = parts + self._pass(window, batch, weight / steps, last=last and step == steps)
        finally:
            there.active, there.delta, there.batch = False, None, None
        return parts

    @staticmethod
    def _pass(window: Window, batch: Batch, factor: float, *, last: bool) -> Tensor:
        with window.engine.accumulate(last=last):
            loss = window.forward(batch)
            window.engine.backward(window.scale.apply(loss.total * factor))
        return loss.parts * factor

    @torch.no_grad()
    def _climb(self) -> None:
        """The next δ, from the gradient by the last one."""
        delta, batch = self.perturbation.delta, self.perturbation.batch
        assert delta is not None, "the forward did not reach the embedding"
        assert delta.grad is not None
        assert batch is not None
        sequences = sequence_numbers(batch, delta)
        direction = unit_rows(delta.grad, sequences)
        if isinstance(self.settings, FGM):
            self.perturbation.delta = self.settings.epsilon * direction
            return
        length = self.settings.step_size or 2.5 * self.settings.epsilon / self.settings.steps
        self.perturbation.delta = into_ball(
            delta.detach() + length * direction, sequences, self.settings.epsilon
        )


def sequence_numbers(batch: Batch, embedded: Tensor) -> Tensor:
    """Which sequence of its row each position belongs to, from 1; 0: padding. int64 [rows, positions]."""
    rows, positions = embedded.shape[:2]
    mask, places = batch.inputs.get("attention_mask"), batch.inputs.get("position_ids")
    if mask is not None and mask.dim() == 2:
        return (mask != 0).long()
    if places is not None:
        return (places == 0).long().cumsum(1).expand(rows, positions)
    return torch.ones(rows, positions, dtype=torch.int64, device=embedded.device)


def sequence_norms(values: Tensor, sequences: Tensor) -> Tensor:
    """The L2 norm of the sequence that each position belongs to: [rows, positions, 1]; 0 at padding."""
    squares = values.square().sum(-1) * (sequences > 0)
    sums = torch.zeros(len(values), values.shape[1] + 1, dtype=values.dtype, device=values.device)
    sums.scatter_add_(1, sequences, squares)
    return (sums.gather(1, sequences).sqrt() * (sequences > 0)).unsqueeze(-1)


def unit_rows(gradient: Tensor, sequences: Tensor) -> Tensor:
    """The gradient over its norm, sequence by sequence; 0 where it is 0 (padding, rows without a label) or, under fp16,
    overflowed."""
    # over the largest element first: squares of a small gradient would be 0
    largest = gradient.abs().amax(dim=(1, 2), keepdim=True)
    scaled = gradient / largest.clamp_min(1e-38)
    norms = sequence_norms(scaled, sequences)
    fit = (norms > 0) & torch.isfinite(norms)
    return torch.where(fit, scaled / torch.where(fit, norms, 1.0), 0.0)


def into_ball(delta: Tensor, sequences: Tensor, radius: float) -> Tensor:
    """Each sequence's δ, no longer than `radius`."""
    return delta * (radius / sequence_norms(delta, sequences).clamp_min(1e-30)).clamp_max(1.0)
