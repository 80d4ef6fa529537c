"""One row of each objective as text, with what is trained in it marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from tunesmith.batch import IGNORED
from tunesmith.data.order import Salt
from tunesmith.data.prepare import Dataset
from tunesmith.data.table import Encoded
from tunesmith.errors import Place
from tunesmith.objectives import Objective
from tunesmith.objectives.classification import ClassificationObjective
from tunesmith.objectives.masked_lm import MaskedLMObjective
from tunesmith.objectives.question_answering import QuestionAnsweringObjective
from tunesmith.objectives.seq2seq import EncoderDecoderObjective
from tunesmith.objectives.token_classification import TokenClassificationObjective

Piece = tuple[str, bool]  # a text, and whether it is trained

_LONGEST = 1200  # characters of a piece; a longer one loses its middle


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class Sample:
    """`about` says how much of the row is trained."""

    place: Place
    parts: list[Part]
    about: str


def sample(objective: Objective, dataset: Dataset, row: int, seed: int) -> Sample:
    """A row as the first epoch draws it."""
    stored = dataset.table.row(row)
    drawn = objective.draw(stored, (seed, 0, row, Salt.ROW))
    tokenizer, ids = objective.tokenizer, ints(drawn["input_ids"])
    about = f"{len(ids)} tokens"
    match objective:
        case ClassificationObjective():
            parts = [Part("label", [(_label(objective, drawn), True)]), _plain("text", tokenizer, ids)]
        case TokenClassificationObjective():
            parts = [Part("words", _tagged(objective, drawn, ids))]
        case QuestionAnsweringObjective():
            held = drawn["offsets"][2 * drawn["start"]] >= 0
            inside = [held and drawn["start"] <= i <= drawn["end"] for i in range(len(ids))]
            parts = [Part("window", pieces(tokenizer, ids, inside))]
            about += "" if held else ", without the answer"
        case EncoderDecoderObjective():
            target = ints(drawn["labels"])
            whole = Part("target", pieces(tokenizer, target, [True] * len(target)))
            parts = [_plain("source", tokenizer, ids), whole]
            about += f", {len(target)} of the target are trained"
        case MaskedLMObjective():
            parts = [Part("text", _masked(tokenizer, ids, ints(stored["input_ids"]), drawn["labels"]))]
            about += _share(drawn["labels"])
        case _:
            labels = np.asarray(drawn["labels"])
            parts = [Part("text", pieces(tokenizer, ids, (labels != IGNORED).tolist()))]
            about += _share(labels)
    return Sample(dataset.place(row), parts, about)


def pieces(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> list[Piece]:
    """The decoded tokens, neighbours of one kind together, special tokens written out. Each is what its tokens add
    to the text before them, so that spaces are where the text has them."""
    found: list[Piece] = []
    end, before = 0, ""
    for is_trained, group in groupby(trained):
        end += len(list(group))
        text = decode(tokenizer, ids[:end])
        found.append((_short(text[len(before) :]), is_trained))
        before = text
    return found


def _plain(name: str, tokenizer: Any, ids: Sequence[int]) -> Part:
    return Part(name, pieces(tokenizer, ids, [False] * len(ids)))


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """With special tokens written out."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _short(text: str) -> str:
    half = _LONGEST // 2
    if len(text) <= _LONGEST:
        return text
    return f"{text[:half]} …({len(text) - _LONGEST:,} characters)… {text[-half:]}"


def _label(objective: ClassificationObjective, row: Encoded) -> str:
    if objective.problem == "regression":
        return ", ".join(f"{float(value):g}" for value in row["numbers"])
    return ", ".join(objective.labels[label] for label in row["labels"]) or "(none)"


def _tagged(objective: TokenClassificationObjective, row: Encoded, ids: Sequence[int]) -> list[Piece]:
    """word/TAG, the entities trained to be found marked; words that were cut off have no piece."""
    places = [
        (int(at), int(tag)) for at, tag in zip(row["first_pieces"], row["tags"], strict=True) if at >= 0
    ]
    special = set(objective.tokenizer.all_special_ids)
    found: list[Piece] = []
    for (start, tag), (stop, _) in pairwise([*places, (len(ids), 0)]):
        word = [token for token in ids[start:stop] if token not in special]
        name = objective.labels[tag]
        text = decode(objective.tokenizer, word).strip()
        found += [(f"{text}/{name}", name != "O"), (" ", False)]
    return found


def _masked(tokenizer: Any, ids: Sequence[int], original: Sequence[int], labels: Any) -> list[Piece]:
    """A chosen token as what it was → what the model sees in its place."""
    found: list[Piece] = []
    for i, label in enumerate(ints(labels)):
        if label == IGNORED:
            text, trained = tokenizer.convert_ids_to_tokens(original[i]), False
        else:
            was, seen = (tokenizer.convert_ids_to_tokens(token) for token in (original[i], ids[i]))
            text, trained = f"{was}→{seen}", True
        found += [(text, trained), (" ", False)]
    return found


def _share(labels: Any) -> str:
    labels = np.asarray(labels)
    trained = int((labels != IGNORED).sum())
    return f", {trained} of them trained ({trained / max(len(labels), 1):.0%})"


def ints(values: Any) -> list[int]:
    return [int(value) for value in values]
