"""Metrics of tagged entities: a predicted entity counts when its type and both its ends are right (CoNLL-2000
and 2003 shared tasks' `conlleval`; seqeval's default mode)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from tunesmith.errors import UserError
from tunesmith.metrics.labels import ClassScore, Counts, class_scores

Span = tuple[str, int, int]
Entities = set[tuple[int, Span]]  # the number of the sentence, and where in it


def entity_spans(tags: Sequence[str]) -> set[Span]:
    """The entities of one sentence of BIO (IOB2) tags, as (type, start, end): word indices, `end` exclusive.

    An I-X that continues no X (at the start, after O, after another type) begins an entity, as if it were
    B-X: conlleval's and seqeval's default reading, so IOB1 files are read right too. `B-X B-X` are two
    entities. The type is what follows the first hyphen ("B-foo-bar": "foo-bar"; a bare "B" or "I": "_"). Any
    other tag is a UserError."""
    spans: set[Span] = set()
    open_type, start = None, 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if prefix not in ("B", "I") and tag != "O":
            raise UserError(f"{tag!r} is not a BIO tag: O, B-type or I-type")
        current = None if tag == "O" else name or "_"
        if prefix == "I" and current == open_type:
            continue
        if open_type is not None:
            spans.add((open_type, start, i))
        open_type, start = current, i
    return spans


def entity_metrics(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """`precision`, `recall`, `f1` (micro: over all entities, the numbers that conlleval prints),
    `macro_precision`, `macro_recall`, `macro_f1` (means over the types), and `accuracy` of the tags.

    `predictions`, `references`: BIO tags, [sentences][words], equally long. Types are those of the references
    and the predictions together, as in seqeval. A ratio without a denominator is 0.0 (no entity predicted:
    precision; none to find: recall; neither anywhere: all six). No words: all nan."""
    words = _words(predictions, references)
    if words == 0:
        return dict.fromkeys(_NAMES, math.nan)
    given_entities, predicted_entities = _entities(references), _entities(predictions)
    table = _table(predicted_entities, given_entities)
    predicted = sum(row.predicted for row in table)
    support = sum(row.support for row in table)
    hits = len(predicted_entities & given_entities)
    types = max(len(table), 1)
    return {
        "precision": hits / max(predicted, 1),
        "recall": hits / max(support, 1),
        "f1": 2 * hits / max(predicted + support, 1),
        "macro_precision": sum(row.precision for row in table) / types,
        "macro_recall": sum(row.recall for row in table) / types,
        "macro_f1": sum(row.f1 for row in table) / types,
        "accuracy": _right_tags(predictions, references) / words,
    }


_NAMES = ("precision", "recall", "f1", "macro_precision", "macro_recall", "macro_f1", "accuracy")


def entity_table(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> tuple[ClassScore, ...]:
    """Every entity type that occurs in the references or the predictions, sorted by name."""
    _words(predictions, references)
    return _table(_entities(predictions), _entities(references))


def _table(predicted: Entities, given: Entities) -> tuple[ClassScore, ...]:
    names = sorted({name for _, (name, _, _) in predicted | given})

    def per_type(entities: Entities) -> Counts:
        counts = Counter(name for _, (name, _, _) in entities)
        return np.array([counts[name] for name in names], dtype=np.int64)

    return class_scores(names, per_type(predicted & given), per_type(predicted), per_type(given))


def _words(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> int:
    lengths = [len(tags) for tags in references]
    assert lengths == [len(tags) for tags in predictions], "one predicted tag per word"
    return sum(lengths)


def _entities(sentences: Sequence[Sequence[str]]) -> Entities:
    return {(i, span) for i, tags in enumerate(sentences) for span in entity_spans(tags)}


def _right_tags(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> int:
    return sum(
        predicted == given
        for sentence in zip(predictions, references, strict=True)
        for predicted, given in zip(*sentence, strict=True)
    )
