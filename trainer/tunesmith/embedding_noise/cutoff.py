"""Cutoff (Shen et al. 2020, "A Simple but Tough-to-Beat Data Augmentation Approach for Natural Language Understanding
and Generation"): a fraction of a row's embedded input is zero. Their loss also asks that several cut copies of a row
are predicted alike, which is `regularization.r_drop`'s part; this is the cut alone.

Random numbers are a hash of the row's own draw and the position, so that what is cut is a pure function of (seed,
epoch, row), computed where the batch lies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.batch import IGNORED, Batch
from tunesmith.recipe import augment as settings


class Cutoff:
    """Zeroes in each row that it falls on: `token`: each token with probability `fraction`; `span`: one run of
    `fraction` × the tokens (rounded, at least one); `feature`: each number of the embedding, at all tokens, with
    probability `fraction`. Special tokens and padding are no tokens here, nor is what is trained, where
    `only_unlabelled`."""

    def __init__(
        self, asked: settings.Cutoff, number: int, special: tuple[int, ...], only_unlabelled: bool
    ) -> None:
        self.asked = asked
        self.number = number
        self.special = special
        self.only_unlabelled = only_unlabelled

    def __call__(self, embedded: Tensor, batch: Batch, module: nn.Module) -> Tensor:
        if batch.draws is None:
            return embedded
        gone = self.hidden(batch, embedded.shape[-1])
        return embedded.masked_fill(gone, 0.0)

    def hidden(self, batch: Batch, width: int) -> Tensor:
        """What is zeroed: bool [rows, positions, 1], or for features [rows, positions, width]."""
        assert batch.draws is not None
        draws, fraction = batch.draws, self.asked.fraction
        real = self._tokens(batch)
        falls = uniform(draws, 1, self.number, 0)[:, 0] < self.asked.probability
        match self.asked.kind:
            case "token":
                chosen = real & (uniform(draws, real.shape[1], self.number, 1) < fraction)
            case "span":
                chosen = real & self._span(real, uniform(draws, 1, self.number, 1)[:, 0])
            case "feature":
                features = uniform(draws, width, self.number, 1) < fraction
                return real[:, :, None] & features[:, None, :] & falls[:, None, None]
        return (chosen & falls[:, None])[:, :, None]

    def _span(self, real: Tensor, where: Tensor) -> Tensor:
        """A run among the tokens of each row, which special tokens may interrupt."""
        count = real.sum(1)  # [rows]
        length = (self.asked.fraction * count).round().long().clamp(min=1)
        start = (where * (count - length + 1)).long()
        place = real.long().cumsum(1) - 1  # [rows, positions]: the how-manieth token
        return (place >= start[:, None]) & (place < (start + length)[:, None])

    def _tokens(self, batch: Batch) -> Tensor:
        ids = batch.inputs["input_ids"]
        real = batch.inputs["attention_mask"] != 0 if "attention_mask" in batch.inputs else ids >= 0
        for token in self.special:
            real = real & (ids != token)
        if self.only_unlabelled:
            real = real & (batch.targets["labels"] == IGNORED)
        return real


def uniform(draws: Tensor, n: int, *salts: int) -> Tensor:
    """Numbers in [0, 1) that are a hash of (draw, place, salts), by splitmix64's finaliser (Steele et al. 2014): fp64
    [rows, n]. `draws`: int64 [rows]."""
    places = torch.arange(n, device=draws.device)
    state = _mixed(draws)[:, None]
    for salt in salts:
        state = _mixed(state + _signed((salt + 1) * 0x9E3779B97F4A7C15))
    state = _mixed(state + (places + 1)[None] * _signed(0x9E3779B97F4A7C15))
    return _shifted(state, 11).double() * 2.0**-53


def _mixed(state: Tensor) -> Tensor:
    # int64 products wrap around, as those of splitmix64's unsigned numbers do
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """The logical shift to the right; torch's own repeats the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number
