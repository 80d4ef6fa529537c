"""The rows of mixup (`data.augment`): each with its partner and its λ, and batches of both. What is done with them
is `tunesmith.embedding_noise.mixup`'s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from tunesmith.batch import Batch
from tunesmith.data.augment.transform import falls, full_key, transforms
from tunesmith.data.order import raw
from tunesmith.data.table import Encoded, Table
from tunesmith.objectives import Objective
from tunesmith.recipe import augment as settings

if TYPE_CHECKING:
    from tunesmith.data.stream import Transform

PARTNER, SHARE = "partner", "partner/lambda"
"""The key of a row's partner, and of its λ; the partner's tensors are among a batch's targets as `partner/NAME`."""


class Pairs:
    """Gives each row its partner, encoded and passed through the transforms `before` as rows are, and its λ, which is 1
    where the mixing does not fall on the row."""

    def __init__(self, asked: settings.Mixup, number: int, table: Table, before: Sequence[Transform]) -> None:
        self.asked = asked
        self.number = number
        self.table = table
        self.before = tuple(before)

    def __call__(self, row: Encoded, key: tuple[int, ...]) -> Encoded:
        key = full_key(key)
        chance, share = 1.0, (*key, self.number, 1)
        if falls(self.asked.probability, (*key, self.number)):
            chance = beta(self.asked.alpha, share)
        other = self.partner(key)
        partner = self.table.row(other)
        for transform in self.before:
            partner = transform(partner, (*key[:2], other, *key[3:]))
        return row | {PARTNER: partner, SHARE: chance}

    def partner(self, key: tuple[int, ...]) -> int:
        """The place in the table of the row that a row is mixed with."""
        return int(raw(1, *full_key(key), self.number, 2)[0] % np.uint64(len(self.table)))


def beta(alpha: float, key: tuple[int, ...]) -> float:
    """A number of Beta(alpha, alpha) that is a pure function of the key. Up to alpha 1 by Jöhnk's rejection, beyond it
    by Ulrich's formula for symmetric ones (Devroye 1986, chapter IX.3.5 and IX.4.3)."""
    if alpha > 1.0:
        u, v = _open(raw(2, *key))
        return 0.5 + 0.5 * math.cos(2.0 * math.pi * v) * math.sqrt(1.0 - u ** (2.0 / (2.0 * alpha - 1.0)))
    attempt = 0
    while True:
        # by logarithms: u^(1/alpha) would be 0 for a small alpha
        u, v = (math.log(number) / alpha for number in _open(raw(2, *key, attempt)))
        total = max(u, v) + math.log1p(math.exp(-abs(u - v)))
        if total <= 0.0:
            return math.exp(u - total)
        attempt += 1


def _open(numbers: Any) -> tuple[float, float]:
    """In (0, 1)."""
    first, second = ((int(number >> np.uint64(11)) + 0.5) * 2.0**-53 for number in numbers)
    return first, second


def augmentation(
    asked: Sequence[settings.Operation], objective: Objective, table: Table, variants: Table | None
) -> tuple[list[Transform], Objective]:
    """What training rows are passed through, and the objective that collates them. Paths are absolute. Raises as
    `transforms` does."""
    found = transforms(asked, objective, variants)
    for number, one in enumerate(asked):
        if isinstance(one, settings.Mixup):
            return [*found, Pairs(one, number, table, found)], pairing(objective)
    return found, objective


class PairingObjective:
    """An objective whose batches of training rows have their partners' too; all else is the objective's own."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def collate(self, rows: Sequence[Encoded], places: Sequence[int]) -> Batch:
        made = self._objective.collate(rows, places)
        other = self._objective.collate([row[PARTNER] for row in rows], places)
        width = max(batch.inputs["input_ids"].shape[1] for batch in (made, other))
        mine, theirs = (
            {name: F.pad(value, (0, width - value.shape[1]), value=self._blank(name))
             for name, value in batch.inputs.items()}
            for batch in (made, other)
        )  # fmt: skip
        targets = {f"{PARTNER}/{name}": value for name, value in other.targets.items()}
        targets |= {f"{PARTNER}/{name}": theirs[name] for name in ("input_ids", "attention_mask")}
        # what is attended to is both; which positions are the row's own, the mixing must still know
        targets[f"{PARTNER}/own_mask"] = mine["attention_mask"]
        share = torch.tensor([row[SHARE] for row in rows], dtype=torch.float32)
        both = torch.maximum(mine["attention_mask"], theirs["attention_mask"])
        mine["attention_mask"] = torch.where(share[:, None] < 1.0, both, mine["attention_mask"])
        targets[SHARE] = share
        return replace(made, inputs=mine, targets=made.targets | targets)

    def _blank(self, name: str) -> int:
        return (self._objective.tokenizer.pad_token_id or 0) if name == "input_ids" else 0


def pairing(objective: Objective) -> Objective:
    """Everything an objective does, and partners in the batches that it collates."""
    return cast(Objective, PairingObjective(objective))
