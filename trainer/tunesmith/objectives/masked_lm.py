"""BERT's masked language modelling, with next-sentence prediction where asked (Devlin et al. 2019). The unit of the
first is a masked token, of the second a row; each is divided by its own units."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tunesmith.batch import IGNORED, Batch
from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import Example, Text
from tunesmith.data.order import Salt, raw
from tunesmith.data.table import Encoded, Kind
from tunesmith.errors import UserError
from tunesmith.objectives.base import Objective, Truncation, pad_labels, text_inputs
from tunesmith.recipe.objective import MaskedLM
from tunesmith.terms import RowCrossEntropy

_SENTENCE = re.compile(r"(?<=[.!?。!?])\s+|\n+")
_PAIR_SEED = 0  # pairs are made once, when the rows are encoded


class MaskedLMObjective(Objective):
    accepts = (Text,)
    kinds: ClassVar[dict[str, Kind]] = {"special": "ints", "token_type_ids": "ints"}

    def __init__(self, settings: MaskedLM, tokenizer: Any, max_length: int, truncation: Truncation) -> None:
        super().__init__(tokenizer, max_length, truncation)
        if tokenizer.mask_token_id is None:
            raise UserError("objective: masked_lm needs a tokenizer with a mask token")
        self.settings = settings
        if settings.next_sentence:
            self.use_loss(settings, name="mlm", logits="prediction_logits")
            self.terms += (
                RowCrossEntropy(
                    name="next_sentence", logits="seq_relationship_logits", target="next_sentence"
                ),
            )
        else:
            self.use_loss(settings)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint | {"next_sentence": self.settings.next_sentence}

    # rows

    def encode(self, example: Example) -> Iterator[Encoded | Dropped]:
        """A long document becomes several rows, none of it lost."""
        assert isinstance(example, Text)
        if not example.text.strip():
            yield Dropped("empty text")
            return
        found = self.tokenizer(
            example.text,
            truncation=True,
            max_length=self.max_length,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        if self.truncation == "drop" and len(found["input_ids"]) > 1:
            yield Dropped("longer than max_length")
            return
        for i, ids in enumerate(found["input_ids"]):
            yield self._row(ids, found["special_tokens_mask"][i], [0] * len(ids))

    def encode_all(self, examples: Iterator[Example]) -> Iterator[tuple[Example, Encoded | Dropped]]:
        if not self.settings.next_sentence:
            yield from super().encode_all(examples)
            return
        documents = list(examples)
        sentences = [self._sentences(document) for document in documents]
        for i, document in enumerate(documents):
            if not sentences[i]:
                yield document, Dropped("empty text")
                continue
            yield from ((document, row) for row in self._pairs(i, sentences))

    def _sentences(self, example: Example) -> list[list[int]]:
        assert isinstance(example, Text)
        parts = [part for part in _SENTENCE.split(example.text) if part.strip()]
        if not parts:
            return []
        room = (self.max_length - 3) // 2
        found = self.tokenizer(parts, add_special_tokens=False)["input_ids"]
        return [ids[:room] for ids in found if ids]

    def _pairs(self, document: int, sentences: Sequence[list[list[int]]]) -> Iterator[Encoded]:
        """Segment A is a run of sentences, B what follows it (label 0) or, half of the time, a run of another
        document (label 1), from whose place in this document the next pair goes on. As many sentences as fit."""
        own, at, draw = sentences[document], 0, 0
        half = (self.max_length - 3) // 2
        while at < len(own):
            first, at = _run(own, at, half)
            chosen = raw(3, _PAIR_SEED, document, draw, Salt.ROW)
            draw += 1
            other = int(chosen[1] % np.uint64(len(sentences)))
            is_random = at >= len(own) or bool(chosen[0] & np.uint64(1))
            if is_random and (other == document or not sentences[other]):
                if at >= len(own):
                    return  # nothing follows and no other document to draw from
                is_random = False
            if is_random:
                start = int(chosen[2] % np.uint64(len(sentences[other])))
                second, _ = _run(sentences[other], start, half)
            else:
                second, at = _run(own, at, half)
            yield self._pair(first, second, int(is_random))

    def _pair(self, first: list[int], second: list[int], label: int) -> Encoded:
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        ids = [cls, *first, sep, *second, sep]
        special = [1, *[0] * len(first), 1, *[0] * len(second), 1]
        kinds = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        return self._row(ids, special, kinds) | {"next_sentence": label}

    def _row(self, ids: list[int], special: list[int], kinds: list[int]) -> Encoded:
        row: Encoded = {"input_ids": ids, "special": special, "truncated": 0}
        return (
            row | {"token_type_ids": kinds} if "token_type_ids" in self.tokenizer.model_input_names else row
        )

    # batches

    def draw(self, row: Encoded, key: tuple[int, ...]) -> Encoded:
        """Masks a fresh choice of tokens: of those chosen, `mask_replace_prob` become the mask, then
        `random_replace_prob` a random token, the rest stay. At least one is chosen."""
        ids = np.array(row["input_ids"], dtype=np.int64)
        n = len(ids)
        dice = raw(3 * n, *key).reshape(3, n)
        chance = (dice[0] / 2.0**64).astype(np.float64)
        chance[np.asarray(row["special"]) != 0] = np.inf
        chosen = chance < self.settings.mlm_probability
        if not chosen.any() and np.isfinite(chance).any():
            chosen[int(chance.argmin())] = True
        labels = np.where(chosen, ids, IGNORED)
        action: NDArray[np.float64] = dice[1] / 2.0**64
        masked = chosen & (action < self.settings.mask_replace_prob)
        swapped = (
            chosen & ~masked & (action < self.settings.mask_replace_prob + self.settings.random_replace_prob)
        )
        ids[masked] = self.tokenizer.mask_token_id
        ids[swapped] = (dice[2] % np.uint64(len(self.tokenizer))).astype(np.int64)[swapped]
        return row | {"input_ids": ids, "labels": labels}

    def collate(self, rows: Sequence[Encoded], places: Sequence[int]) -> Batch:
        inputs, tokens = text_inputs(self.tokenizer, rows)
        targets = {"labels": pad_labels([row["labels"] for row in rows])}
        if self.settings.next_sentence:
            targets["next_sentence"] = torch.tensor([row["next_sentence"] for row in rows])
            targets["row_mask"] = torch.ones(len(rows))
        return Batch(inputs, targets, tuple(places), tokens)

    # model

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForMaskedLM, AutoModelForPreTraining

        return AutoModelForPreTraining if self.settings.next_sentence else AutoModelForMaskedLM

    def outputs(self, model: nn.Module, batch: Batch, **options: Any) -> Mapping[str, Any]:
        found = super().outputs(model, batch, **options)
        if self.settings.next_sentence and "seq_relationship_logits" not in found:
            raise UserError(f"objective.next_sentence: {type(model).__name__} has no next-sentence head")
        return found

    def loss_metrics(self, loss: float) -> dict[str, float]:
        if self.settings.next_sentence:
            return {}  # the sum of two losses has no perplexity
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf}


def _run(sentences: Sequence[list[int]], start: int, room: int) -> tuple[list[int], int]:
    """Whole sentences from `start` while they fit (one at least), and the place behind them."""
    ids = list(sentences[start])
    stop = start + 1
    while stop < len(sentences) and len(ids) + len(sentences[stop]) <= room:
        ids += sentences[stop]
        stop += 1
    return ids, stop
