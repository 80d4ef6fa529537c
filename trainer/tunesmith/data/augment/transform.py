"""What the stream passes each training row through (`data.augment`).

The text of a row is changed and encoded again by the objective itself, so that truncation, templates, special tokens,
windows and tags come out as they do for every other row. Where what is learnt would not be what it was (an answer cut
off, a window without its answer), or a text would be empty, the row stays as it is. All of it is a pure function of
the row and (seed, epoch, row)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.batch import IGNORED
from tunesmith.data.augment import operations, synonyms
from tunesmith.data.augment.operations import Operation
from tunesmith.data.augment.stored import EXAMPLE, PART, from_json
from tunesmith.data.augment.variants import BackTranslated
from tunesmith.data.augment.words import Unit, fields, with_fields
from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import Example, Text, Tokens
from tunesmith.data.order import raw
from tunesmith.data.table import Encoded, Table
from tunesmith.errors import UserError
from tunesmith.objectives import Objective
from tunesmith.recipe import augment as settings

if TYPE_CHECKING:
    from tunesmith.data.stream import Transform

Texts = list[list[Unit]]
Change = Callable[[Texts, tuple[int, ...]], Texts]
"""(the texts of a row, (seed, epoch, row, …)) → its texts."""


def keeps_examples(asked: Sequence[settings.Operation], objective: Objective) -> bool:
    """Whether the training table must keep the examples that its rows were made of: those of an objective that learns
    the text itself are never changed."""
    return Text not in objective.accepts and any(isinstance(one, settings.OF_WORDS) for one in asked)


def transforms(
    asked: Sequence[settings.Operation], objective: Objective, variants: Table | None
) -> list[Transform]:
    """The recipe's operations on words; those on embeddings are not among them. Paths are absolute. Without `variants`
    back-translation changes nothing. Raises UserError or MachineError for a table, token or library that is not
    there."""
    of_words = [(i, one) for i, one in enumerate(asked) if isinstance(one, settings.OF_WORDS)]
    if keeps_examples(asked, objective):
        changes = [(i, one.probability, _change(i, one, objective, variants)) for i, one in of_words]
        return [Augment(objective, changes)]
    return [
        MaskTokens(objective.tokenizer, i, one) for i, one in of_words if isinstance(one, settings.TokenMask)
    ]


class Augment:
    """Each of the `changes` (number, probability, change) in turn, on the texts of a row."""

    def __init__(self, objective: Objective, changes: Sequence[tuple[int, float, Change]]) -> None:
        self.objective = objective
        self.changes = tuple(changes)

    def __call__(self, row: Encoded, key: tuple[int, ...]) -> Encoded:
        kept = {name: value for name, value in row.items() if name not in (EXAMPLE, PART)}
        key = full_key(key)
        due = [(i, change) for i, probability, change in self.changes if falls(probability, (*key, i))]
        if not due:
            return kept
        example = from_json(row[EXAMPLE])
        before = fields(example)
        texts = before
        for i, change in due:
            texts = change(texts, (*key, i, 1))
        emptied = any(was and not now for was, now in zip(before, texts, strict=True))
        if texts == before or emptied:
            return kept
        found = self._encoded(with_fields(example, texts), row[PART])
        if found is None or not (isinstance(example, Tokens) or _learnt(found) == _learnt(kept)):
            return kept
        return kept | found

    def _encoded(self, example: Example, part: int) -> Encoded | None:
        rows = list(self.objective.encode(example))
        if part >= len(rows) or isinstance(found := rows[part], Dropped):
            return None
        return {name: value for name, value in found.items() if name not in ("truncated", "changed")}


class MaskTokens:
    """Masks tokens of the input of next-token prediction; the labels stay (word dropout of the decoder: Bowman et al.
    2016). Special tokens stay."""

    def __init__(self, tokenizer: Any, index: int, asked: settings.TokenMask) -> None:
        self.index = index
        self.asked = asked
        self.token = _token_id(asked, index, tokenizer)
        self.special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)

    def __call__(self, row: Encoded, key: tuple[int, ...]) -> Encoded:
        key = full_key(key)
        if not falls(self.asked.probability, (*key, self.index)):
            return row
        ids = np.array(row["input_ids"], dtype=np.int64)
        hidden = raw(len(ids), *key, self.index, 1) / 2.0**64 < self.asked.fraction
        ids[hidden & ~np.isin(ids, self.special)] = self.token
        return row | {"input_ids": ids}


def full_key(key: tuple[int, ...]) -> tuple[int, ...]:
    """(seed, epoch, row, salt, copy): the stream leaves out the number of a row's first copy in its epoch."""
    return key if len(key) > 4 else (*key, 0)


def falls(probability: float, key: tuple[int, ...]) -> bool:
    """True with the probability, by the key."""
    return probability >= 1.0 or float(raw(1, *key)[0] / 2.0**64) < probability


def _learnt(row: Encoded) -> list[Any]:
    """What a row teaches: its labels, numbers, and the tokens of its answer."""
    labels = np.asarray(row.get("labels", ()))
    start, end = row.get("start", 0), row.get("end", -1)
    # the table's precision: numbers come back from it as fp32
    numbers = np.asarray(row.get("numbers", ()), dtype=np.float32)
    parts = (labels[labels != IGNORED], numbers, np.asarray(row["input_ids"][start : end + 1]))
    return [part.tolist() for part in parts]


def _change(index: int, asked: settings.Operation, objective: Objective, variants: Table | None) -> Change:
    match asked:
        case settings.TokenMask():
            token = _token(asked, index, objective.tokenizer)
            return _on_each(partial(operations.mask, fraction=asked.fraction, token=token))
        case settings.TokenDrop():
            return _on_each(partial(operations.drop, fraction=asked.fraction))
        case settings.TokenSwap():
            return _on_each(partial(operations.swap, fraction=asked.fraction, swaps=asked.swaps))
        case settings.TokenInsert():
            return _on_each(partial(operations.insert, fraction=asked.fraction, synonyms=_synonyms(asked)))
        case settings.Synonyms():
            found = _synonyms(asked)
            assert found is not None
            return _on_each(partial(operations.replace_synonyms, fraction=asked.fraction, synonyms=found))
        case settings.BackTranslation():
            return BackTranslated(variants)
        case _:
            raise AssertionError(f"{asked.type} does not change words")


def _on_each(operation: Operation) -> Change:
    """Each text of a row with random numbers of its own."""

    def change(texts: Texts, key: tuple[int, ...]) -> Texts:
        return [
            operation(units, lambda n, i=i: raw(n, *key, i)) if units else units
            for i, units in enumerate(texts)
        ]

    return change


def _synonyms(asked: settings.Synonyms | settings.TokenInsert) -> operations.Synonyms | None:
    if asked.table is not None:
        return synonyms.of_table(Path(asked.table))
    return synonyms.of_wordnet() if asked.source == "wordnet" else None


def _token(asked: settings.TokenMask, index: int, tokenizer: Any) -> str:
    """The mask as a text; UserError where the tokenizer does not read it as one token."""
    token, known = getattr(tokenizer, f"{asked.token}_token"), _token_id(asked, index, tokenizer)
    if tokenizer(token, add_special_tokens=False)["input_ids"] != [known]:
        raise UserError(
            f"data.augment.{index}.token: {type(tokenizer).__name__} does not read {token} as one token: take another "
            "operation"
        )
    return token


def _token_id(asked: settings.TokenMask, index: int, tokenizer: Any) -> int:
    found: int | None = getattr(tokenizer, f"{asked.token}_token_id")
    if found is None:
        other = "unk" if asked.token == "mask" else "mask"
        has_other = getattr(tokenizer, f"{other}_token_id") is not None
        fix = f"write token: {other}" if has_other else "leave token_mask out, or add one by model.add_tokens"
        raise UserError(f"data.augment.{index}.token: the tokenizer has no {asked.token} token: {fix}")
    return found
