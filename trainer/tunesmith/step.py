"""One optimizer step, on one screen. The same on every backend: what differs lives in the engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith import update
from tunesmith.batch import Batch
from tunesmith.data.order import Salt, raw
from tunesmith.engine import Engine
from tunesmith.gradients import clip_coefficient
from tunesmith.loss_scale import LossScale
from tunesmith.parts import Strategies, Window
from tunesmith.terms import Term

PLAIN = Strategies()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves on the device: reading any of it waits for the step."""

    loss: Tensor  # 0-dim fp64: Σ weight × sum / units over the global batch
    terms: Tensor  # fp64 [terms]: sum / units of each
    weights: Tensor  # fp64 [terms]: what each counted in the loss
    penalties: dict[str, Tensor]  # 0-dim fp64, by the name of the strategy
    norm: Tensor  # 0-dim fp64: of the global gradient, before clipping
    counts: Tensor  # fp64 [terms + 3]: units per term, samples, tokens, ranks that were asked to stop
    broken: Tensor  # 0-dim fp32: not zero once a step was not finite; later updates are suppressed too
    overflow: Tensor  # 0-dim fp32: 1 where this update was skipped to lower fp16's loss scale


def seed_generators(seed: int, step: int, micro_step: int, rank: int, device: torch.device) -> None:
    """Dropout and the like are a pure function of the place in the run: a resumed run draws what the whole run
    would have drawn, and no generator state has to be saved."""
    key = int(raw(1, seed, step, micro_step, rank, Salt.MODEL)[0])
    # not torch.manual_seed, which formats the stack for every kind of device that is not there: 0.7 ms
    torch.default_generator.manual_seed(key & (2**63 - 1))
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(key & (2**63 - 1))
    np.random.seed(key & 0xFFFFFFFF)
    random.seed(key)


def train_step(
    engine: Engine,
    batches: Sequence[Batch],  # this rank's micro-batches; equally many on every rank
    terms: Sequence[Term],
    *,
    step: int,
    seed: int,
    learning_rate: float,
    max_grad_norm: float | None,
    scale: LossScale,
    broken: Tensor,
    stop: bool,
    strategies: Strategies = PLAIN,
) -> StepResult:
    # d/dθ of Σ_terms weight · S/U: S sums over the labelled units of the *global* batch, U counts them. U is known
    # before the first backward; engines mean gradients over W ranks, so every micro-batch is divided by U/W.
    batches = [engine.part(batch) for batch in batches]
    own = [sum(term.units(batch) for batch in batches) for term in terms]
    totals = [sum(batch.samples for batch in batches), sum(batch.tokens for batch in batches), int(stop)]
    counts = engine.sum(torch.tensor([*own, *totals], dtype=torch.float64))  # [terms + 3]
    normalizers = (counts[: len(terms)].clamp(min=1) / engine.mean_size).float()  # [terms]
    weights = strategies.weights(step, terms).to(engine.device)  # [terms]
    window = Window(engine, batches, normalizers, weights.float(), scale, step, seed)

    def once() -> Tensor:
        """Forward and backward of the window; a second pass draws the same dropout."""
        parts = torch.zeros(len(terms), device=engine.device)
        for micro_step, batch in enumerate(batches):
            seed_generators(seed, step, micro_step, engine.draw_rank, engine.device)
            parts += strategies.micro_step(window, batch, micro_step == len(batches) - 1)
        return parts

    losses = engine.sum(strategies.gradients(window, once).double()) / engine.mean_size  # [terms]
    total = (weights * losses).sum()
    found = {part.name: part.penalize(step, scale.value) for part in strategies.steps}
    penalties = {name: value for name, value in found.items() if value is not None}
    norm = engine.gradient_square_sum().sqrt() / scale.value
    bad_loss, bad_norm = (~torch.isfinite(total)).float(), (~torch.isfinite(norm)).float()
    # fp16 overflows in the backward are expected: they lower the scale. Anything else that is not finite stays set.
    broken = torch.maximum(broken, bad_loss if scale.enabled else torch.maximum(bad_loss, bad_norm))
    skip = torch.maximum(broken, bad_norm)

    update.set_learning_rates(engine.optimizer, learning_rate, step)
    coefficient = clip_coefficient(norm, max_grad_norm) / scale.value
    for part in strategies.steps:
        part.disturb(step, coefficient)
    engine.step(coefficient, skip)
    scale.update(bad_norm)
    for part in strategies.steps:
        part.observe(step, losses)
        part.after_step(step, skip)
    return StepResult(total, losses, weights, penalties, norm, counts, broken, skip * scale.enabled)
