"""T5's denoising (Raffel et al. 2020, §3.1.4): spans of the text are replaced by sentinels, the target restores
them. The unit is a target token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import Example, Text
from tunesmith.data.order import raw
from tunesmith.data.table import Encoded
from tunesmith.errors import UserError
from tunesmith.objectives.base import Truncation
from tunesmith.objectives.seq2seq import EncoderDecoderObjective
from tunesmith.recipe.objective import SpanCorruption


class SpanCorruptionObjective(EncoderDecoderObjective):
    accepts = (Text,)

    def __init__(
        self, settings: SpanCorruption, tokenizer: Any, max_length: int, truncation: Truncation
    ) -> None:
        super().__init__(tokenizer, max_length, truncation, settings)
        self.settings = settings
        self.sentinels = _sentinels(tokenizer)

    def encode(self, example: Example) -> Iterator[Encoded | Dropped]:
        """A long document becomes several rows, none of it lost. The corrupted text is never longer than the
        text, so a row of `max_length` tokens with its end marker fits."""
        assert isinstance(example, Text)
        ids: list[int] = self.tokenizer(example.text, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.max_length - 1
        if len(ids) > room and self.truncation == "drop":
            yield Dropped("longer than max_length")
            return
        if len(ids) < 2:
            yield Dropped("fewer than two tokens: no span to restore")
            return
        for start in range(0, len(ids), room):
            piece = ids[start : start + room]
            if len(piece) >= 2:
                yield {"input_ids": piece, "truncated": 0}
            else:
                yield Dropped("a last piece of one token: no span to restore")

    def draw(self, row: Encoded, key: tuple[int, ...]) -> Encoded:
        ids = np.asarray(row["input_ids"], dtype=np.int64)
        noise = self._noise_mask(len(ids), key)
        eos = self.tokenizer.eos_token_id
        return {**row, "input_ids": self._replace(ids, noise, eos), "labels": self._replace(ids, ~noise, eos)}

    def _noise_mask(self, length: int, key: tuple[int, ...]) -> NDArray[np.bool_]:
        """Text and noise take turns, text first: both are cut at random into equally many spans."""
        tokens = min(max(round(length * self.settings.noise_density), 1), length - 1)
        spans = round(tokens / self.settings.mean_noise_span_length)
        spans = min(max(spans, 1), tokens, length - tokens, len(self.sentinels))
        noise = _cut(tokens, spans, raw(tokens, *key, 0))
        text = _cut(length - tokens, spans, raw(length - tokens, *key, 1))
        lengths = np.stack([text, noise], axis=1).reshape(-1)
        return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)

    def _replace(self, ids: NDArray[np.int64], gone: NDArray[np.bool_], eos: int) -> NDArray[np.int64]:
        """The ids with every run of `gone` replaced by the next sentinel, and the end marker."""
        starts = gone & ~np.concatenate([[False], gone[:-1]])
        out = ids.copy()
        out[starts] = self.sentinels[: int(starts.sum())]
        return np.append(out[~gone | starts], eos)


def _cut(total: int, parts: int, dice: NDArray[np.uint64]) -> NDArray[np.int64]:
    """`total` as a sum of `parts` positive numbers, every such sum equally likely."""
    edges = np.sort(np.argsort(dice[: total - 1], kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], edges, [total]])).astype(np.int64)


def _sentinels(tokenizer: Any) -> NDArray[np.int64]:
    """T5's <extra_id_0>, <extra_id_1>, …"""
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    while (name := f"<extra_id_{len(ids)}>") in vocabulary:
        ids.append(vocabulary[name])
    if not ids:
        raise UserError(
            "objective: span_corruption needs a tokenizer with sentinels (<extra_id_0>, …), as T5's"
        )
    return np.asarray(ids, dtype=np.int64)
