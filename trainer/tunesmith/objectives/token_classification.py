"""Tags on words (BIO). The unit is a labelled piece: each word's first, or all with `label_all_pieces`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from tunesmith.batch import IGNORED, Batch
from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import Example, Tokens
from tunesmith.data.table import Encoded, Kind, Table
from tunesmith.errors import DataError, UserError
from tunesmith.losses.choose import loss_notes, reweighted, terms_of
from tunesmith.losses.weights import Labels
from tunesmith.metrics.spans import entity_metrics, entity_table
from tunesmith.objectives.base import Objective, Scores, Truncation, pad_labels, text_inputs
from tunesmith.recipe.objective import TokenClassification


class TokenClassificationObjective(Objective):
    accepts = (Tokens,)
    kinds: ClassVar[dict[str, Kind]] = {"tags": "ints", "first_pieces": "ints", "token_type_ids": "ints"}

    def __init__(
        self, settings: TokenClassification, tokenizer: Any, max_length: int, truncation: Truncation
    ) -> None:
        super().__init__(tokenizer, max_length, truncation)
        if not tokenizer.is_fast:
            raise UserError(
                "objective: token_classification needs a fast tokenizer, to know each piece's word"
            )
        self.settings = settings
        self.labels: list[str] = list(settings.labels or [])
        self.train_counts: dict[str, int] = {}

    def fit(self, examples: Iterable[Example]) -> None:
        found = Counter(tag for one in examples if isinstance(one, Tokens) for tag in one.tags or ())
        if not self.labels:
            # O first, then each type's B before its I: an order that does not hang on the rows'
            self.labels = sorted(found, key=lambda tag: (tag != "O", tag[2:], tag[:2]))
        self.train_counts = {name: found[name] for name in self.labels}
        self.load_state(self.state())

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels, "counts": self.train_counts}

    def load_state(self, state: dict[str, Any]) -> None:
        self.labels = state["labels"]
        self._ids = {name: i for i, name in enumerate(self.labels)}
        self.train_counts = state.get("counts", {})  # older runs have none
        counts = tuple(self.train_counts.get(name, 0) for name in self.labels)
        labels = Labels(self.settings.type, tuple(self.labels), counts, sum(counts))
        self.terms = terms_of(self.settings.loss, labels, self.settings.label_smoothing_factor)
        self.reweighted = reweighted(self.settings.loss, labels)
        self.loss_notes = tuple(loss_notes(self.settings.loss, labels, (*self.terms, self.reweighted)))

    @property
    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint | self.settings.model_dump(exclude={"label_smoothing_factor", "loss"})

    def encode(self, example: Example) -> Iterator[Encoded | Dropped]:
        """A sentence longer than `max_length` is cut behind the last whole word that fits; the words behind it have
        no prediction and count as O in the metrics."""
        assert isinstance(example, Tokens)
        if not example.tokens:
            yield Dropped("no words")
            return
        pieces = self.tokenizer(list(example.tokens), is_split_into_words=True)
        truncated = len(pieces["input_ids"]) > self.max_length
        if truncated:
            if self.truncation == "drop":
                yield Dropped("longer than max_length")
                return
            pieces = self.tokenizer(
                list(example.tokens), is_split_into_words=True, truncation=True, max_length=self.max_length
            )
        words = pieces.word_ids()
        firsts = [i for i, word in enumerate(words) if word is not None and (i == 0 or words[i - 1] != word)]
        if not firsts:
            yield Dropped("no word has a piece")
            return
        tags = [] if example.tags is None else [self._id(tag, example) for tag in example.tags]
        row: Encoded = {
            "input_ids": pieces["input_ids"],
            "labels": self._labels(words, set(firsts), tags),
            "tags": tags,
            "first_pieces": self._positions(words, firsts, len(example.tokens)),
            "truncated": int(truncated),
        }
        if "token_type_ids" in pieces:
            row["token_type_ids"] = pieces["token_type_ids"]
        yield row

    def _labels(self, words: Sequence[int | None], firsts: set[int], tags: Sequence[int]) -> list[int]:
        if not tags:
            return [IGNORED] * len(words)
        every = self.settings.label_all_pieces
        return [
            self._inside(tags[word], i in firsts) if word is not None and (every or i in firsts) else IGNORED
            for i, word in enumerate(words)
        ]

    def _inside(self, tag: int, first: bool) -> int:
        # the later pieces of a word that begins an entity are inside it
        name = self.labels[tag]
        return tag if first or not name.startswith("B-") else self._ids.get(f"I-{name[2:]}", tag)

    @staticmethod
    def _positions(words: Sequence[int | None], firsts: Sequence[int], count: int) -> list[int]:
        # −1: the word has no piece (cut off, or nothing that the tokenizer keeps)
        positions = [-1] * count
        for i in firsts:
            word = words[i]
            assert word is not None
            positions[word] = i
        return positions

    def _id(self, tag: str, example: Tokens) -> int:
        if tag not in self._ids:
            raise DataError(
                f"tag {tag!r} is not among the training tags ({', '.join(self.labels[:12])})",
                example.place,
                "tags",
            )
        return self._ids[tag]

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def config_overrides(self) -> dict[str, Any]:
        return {"id2label": dict(enumerate(self.labels)), "label2id": dict(self._ids)}

    def collate(self, rows: Sequence[Encoded], places: Sequence[int]) -> Batch:
        inputs, tokens = text_inputs(self.tokenizer, rows)
        return Batch(inputs, {"labels": pad_labels([row["labels"] for row in rows])}, tuple(places), tokens)

    def predict(self, outputs: Mapping[str, Any], batch: Batch) -> list[Any]:
        return list(outputs["logits"].argmax(-1).to("cpu").numpy().astype(np.int32))

    def tags_of(self, table: Table, row: int, prediction: Any) -> list[str]:
        """A prediction per piece as a tag per word; O for a word without a piece."""
        positions = table.value("first_pieces", row)
        return [self.labels[prediction[i]] if i >= 0 else "O" for i in positions]

    def score(self, table: Table, rows: Sequence[int], predictions: Sequence[Any]) -> Scores:
        predicted = [self.tags_of(table, row, p) for row, p in zip(rows, predictions, strict=True)]
        given = [[self.labels[tag] for tag in table.value("tags", row)] for row in rows]
        return Scores(entity_metrics(predicted, given), {"entities": entity_table(predicted, given)})

    def presentable(self, table: Table, row: int, prediction: Any) -> dict[str, Any]:
        return {"tags": self.tags_of(table, row, prediction)}

    @property
    def default_metric(self) -> tuple[str, bool]:
        return "f1", True
