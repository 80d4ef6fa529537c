"""On-policy distillation (Agarwal et al. 2024, GKD): a share of a step's rows is answered by the student as it is, and
the divergence from the teacher is taken on these answers; no gradient passes through the sampling.

Which rows, and what is drawn, is a function of (seed, step, row): sampling is by the Gumbel-max trick, whose noise is
a hash of (seed, step, row, place in the answer, token), and so the same however the rows are batched or dealt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.batch import IGNORED, Batch
from tunesmith.data.order import Salt, raw
from tunesmith.data.stream import Stream
from tunesmith.data.table import Encoded
from tunesmith.distill.answers import Kind, answered, prompt_of, up_to_stop
from tunesmith.engine import Engine
from tunesmith.generation import prompt_batch, prompt_room, search_options
from tunesmith.objectives import Objective
from tunesmith.parts import StepPart
from tunesmith.recipe.distill import OnPolicy
from tunesmith.recipe.evaluation import Generate


@dataclass
class OnPolicyPart(StepPart):
    """Answers rows before each step; those whose prompt leaves the model no positions keep the answer of the data."""

    objective: Objective
    settings: OnPolicy
    kind: Kind
    seed: int
    name: str = "on_policy"
    _engine: Engine | None = field(default=None)
    _room: int | None = None

    def begin(self, engine: Engine, stream: Stream) -> None:
        self._engine = engine
        self._room = prompt_room(engine.train_module.model, self.settings.max_new_tokens)

    def rollout(self, step: int, batches: Sequence[Batch]) -> Sequence[Batch]:
        assert self._engine is not None
        self._engine.module.eval()
        with torch.no_grad():
            found = [self._answer(self._engine, step, batch) for batch in batches]
        self._engine.module.train()
        return found

    def _answer(self, engine: Engine, step: int, batch: Batch) -> Batch:
        dice = [raw(2, self.seed, step, row, Salt.ROLLOUT) if row >= 0 else None for row in batch.rows]
        chosen = [
            place
            for place, numbers in enumerate(dice)
            if numbers is not None and float(numbers[0]) / 2.0**64 < self.settings.lmbda
        ]
        rows = _rows(batch, self.kind)
        prompts = {place: prompt_of(rows[place], self.kind) for place in chosen}
        chosen = [place for place in chosen if self._room is None or len(prompts[place]) <= self._room]
        if not chosen:
            if engine.sharded:  # whose ranks generate together, also those that have nothing to ask
                self._generate(engine, [rows[0]["input_ids"][: self._room]], [0])
            return batch
        keys = [int(numbers[1] >> np.uint64(1)) for place in chosen if (numbers := dice[place]) is not None]
        answers = self._generate(engine, [prompts[place] for place in chosen], keys)
        for place, answer in zip(chosen, answers, strict=True):
            rows[place] = answered(rows[place], self.kind, answer, self.objective.max_length) or rows[place]
        made = self.objective.collate(rows, batch.rows)
        return replace(made, draws=batch.draws, task=batch.task)

    def _generate(self, engine: Engine, prompts: Sequence[Any], keys: Sequence[int]) -> list[list[int]]:
        from transformers import LogitsProcessorList

        objective, settings = self.objective, self.settings
        options = search_options(objective, Generate(max_new_tokens=settings.max_new_tokens, num_beams=1))
        if settings.temperature > 0:
            noise = Gumbel(torch.tensor(keys), settings.temperature)
            options["logits_processor"] = LogitsProcessorList([noise])
        asked = prompt_batch(
            prompts, objective.tokenizer.pad_token_id, left=objective.prompt_padding == "left"
        )
        ids: Tensor = engine.forward(asked, "generate", options=options)
        return [up_to_stop(row, objective) for row in ids.tolist()]


class Gumbel:
    """A logits processor: scores / temperature + Gumbel noise, of which the greatest is a sample of softmax(scores /
    temperature) (Gumbel 1954, Maddison et al. 2014). keys: int64 [rows]."""

    def __init__(self, keys: Tensor, temperature: float) -> None:
        self.keys, self.temperature, self.place = keys, temperature, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [rows, classes]; called once for each new token."""
        noise = gumbel(self.keys.to(scores.device), self.place, scores.shape[-1])
        self.place += 1
        return scores.float() / self.temperature + noise


def gumbel(keys: Tensor, place: int, classes: int) -> Tensor:
    """keys int64 [rows] → fp32 [rows, classes], −log(−log u), u a hash of (key, place, class): SplitMix64 (Steele et
    al. 2014) of key + number × its golden gamma, in arithmetic modulo 2⁶⁴."""
    numbers = torch.arange(classes, device=keys.device) + (place * classes + 1)
    x = keys[:, None] + numbers * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shifted(x, 31)
    u = (_shifted(x, 11).double() + 0.5) * 2.0**-53
    return -(-u.log()).log().float()


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, zeros coming in."""
    return (x >> by) & (2 ** (64 - by) - 1)


def _rows(batch: Batch, kind: Kind) -> list[Encoded]:
    """The batch's rows as they were before they were padded."""
    mask, labels = batch.inputs["attention_mask"].bool(), batch.targets["labels"]
    found: list[Encoded] = []
    for i, kept in enumerate(mask):
        row: Encoded = {"input_ids": batch.inputs["input_ids"][i][kept].tolist()}
        if "token_type_ids" in batch.inputs:
            row["token_type_ids"] = batch.inputs["token_type_ids"][i][kept].tolist()
        row["labels"] = labels[i][labels[i] != IGNORED if kind == "seq2seq" else kept].tolist()
        found.append(row)
    return found
