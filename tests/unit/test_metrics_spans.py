"""Entity metrics: hand-computed cases, and a brute force that reads the definition instead of the tags."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from tunesmith.errors import UserError
from tunesmith.metrics import entity_metrics, entity_spans, entity_table


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O O", set()),
        ("B-X I-X O", {("X", 0, 2)}),
        ("B-X I-Y", {("X", 0, 1), ("Y", 1, 2)}),
        ("I-X I-X O", {("X", 0, 2)}),
        ("O I-X", {("X", 1, 2)}),
        ("B-X B-X", {("X", 0, 1), ("X", 1, 2)}),
        ("I-X B-X I-X", {("X", 0, 1), ("X", 1, 3)}),
        ("B-X I-Y I-X", {("X", 0, 1), ("Y", 1, 2), ("X", 2, 3)}),
        ("B-X O I-X", {("X", 0, 1), ("X", 2, 3)}),
        ("B-X I-X B-Y I-Y", {("X", 0, 2), ("Y", 2, 4)}),
        ("B-foo-bar I-foo-bar I-bar", {("foo-bar", 0, 2), ("bar", 2, 3)}),
        ("B I O I", {("_", 0, 2), ("_", 3, 4)}),
    ],
)
def test_spans_by_hand(tags: str, spans: set[tuple[str, int, int]]) -> None:
    assert entity_spans(tags.split()) == spans


def test_no_words_no_entities() -> None:
    assert entity_spans([]) == set()


@pytest.mark.parametrize("tag", ["E-X", "S-X", "L-X", "X", "", "b-X", "O-X", "0"])
def test_other_tags_are_refused(tag: str) -> None:
    with pytest.raises(UserError, match="BIO"):
        entity_spans(["B-X", tag])


def _begins(tags: tuple[str, ...], i: int) -> bool:
    if tags[i][0] == "I":
        return i == 0 or tags[i - 1] == "O" or tags[i - 1][2:] != tags[i][2:]
    return tags[i][0] == "B"


def _brute_force(tags: tuple[str, ...]) -> set[tuple[str, int, int]]:
    """Every interval that begins with a beginning, has no other inside and no O, and cannot be extended."""
    spans: set[tuple[str, int, int]] = set()
    for start, end in itertools.combinations(range(len(tags) + 1), 2):
        inside = range(start, end)
        one_entity = _begins(tags, start) and not any(
            _begins(tags, i) or tags[i] == "O" for i in inside if i > start
        )
        ends = end == len(tags) or tags[end] == "O" or _begins(tags, end)
        if one_entity and ends:
            spans.add((tags[start][2:], start, end))
    return spans


def test_spans_of_every_short_sentence_agree_with_the_brute_force() -> None:
    sentences = itertools.chain.from_iterable(
        itertools.product(("O", "B-X", "I-X", "B-Y", "I-Y"), repeat=words) for words in range(1, 6)
    )
    for tags in sentences:
        assert entity_spans(tags) == _brute_force(tags), tags


def test_metrics_by_hand() -> None:
    references = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "O", "B-LOC", "B-LOC"]]
    predictions = [["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "O", "B-LOC", "I-LOC"]]
    # right: PER 0-2, LOC 3-4; wrong: PER for ORG, LOC 2-4 for two LOC; 5 to find, 4 predicted
    assert entity_metrics(predictions, references) == pytest.approx(
        {
            "precision": 2 / 4,
            "recall": 2 / 5,
            "f1": 4 / 9,
            "macro_precision": (1 / 2 + 0 + 1 / 2) / 3,
            "macro_recall": (1 / 3 + 0 + 1) / 3,
            "macro_f1": (2 / 5 + 0 + 2 / 3) / 3,
            "accuracy": 6 / 8,
        }
    )
    rows = entity_table(predictions, references)
    assert [(row.name, row.support, row.predicted) for row in rows] == [
        ("LOC", 3, 2),
        ("ORG", 1, 0),
        ("PER", 1, 2),
    ]
    assert [row.f1 for row in rows] == pytest.approx([2 / 5, 0.0, 2 / 3])


@pytest.mark.parametrize("seed", range(3))
def test_metrics_agree_with_the_brute_force(seed: int) -> None:
    generator = random.Random(seed)
    tags = ["O", "B-X", "I-X", "B-Y", "I-Y", "B-Z"]
    references = [generator.choices(tags, k=generator.randint(0, 8)) for _ in range(40)]
    predictions = [
        [tag if generator.random() < 0.7 else generator.choice([*tags[:5], "I-W"]) for tag in sentence]
        for sentence in references
    ]

    def counts(name: str | None) -> tuple[int, int, int]:
        hits = predicted = given = 0
        for x, y in zip(predictions, references, strict=True):
            x_spans = {span for span in _brute_force(tuple(x)) if name in (None, span[0])}
            y_spans = {span for span in _brute_force(tuple(y)) if name in (None, span[0])}
            hits += len(x_spans & y_spans)
            predicted += len(x_spans)
            given += len(y_spans)
        return hits, predicted, given

    def scores(hits: int, predicted: int, given: int) -> tuple[float, float, float]:
        precision = hits / predicted if predicted else 0.0
        recall = hits / given if given else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        return precision, recall, f1

    ours = entity_metrics(predictions, references)
    per_type = {name: counts(name) for name in "WXYZ"}
    assert (ours["precision"], ours["recall"], ours["f1"]) == pytest.approx(scores(*counts(None)))
    macro = [sum(column) / 4 for column in zip(*(scores(*c) for c in per_type.values()), strict=True)]
    assert [ours["macro_precision"], ours["macro_recall"], ours["macro_f1"]] == pytest.approx(macro)
    assert all(0 < value < 1 for value in ours.values())
    for row in entity_table(predictions, references):
        hits, predicted, given = per_type[row.name]
        assert (row.precision, row.recall, row.f1) == pytest.approx(scores(hits, predicted, given))
        assert (row.predicted, row.support) == (predicted, given)


def test_sentences_do_not_run_together() -> None:
    assert entity_metrics([["B-X"], ["O"]], [["O"], ["B-X"]])["f1"] == 0.0
    assert entity_metrics([["B-X"], ["I-X"]], [["B-X"], ["B-X"]])["f1"] == 1.0


def test_undefined_cases() -> None:
    nothing_predicted = entity_metrics([["O", "O"]], [["B-X", "O"]])
    assert nothing_predicted["accuracy"] == 0.5
    assert nothing_predicted["precision"] == nothing_predicted["macro_f1"] == 0.0
    nothing_anywhere = entity_metrics([["O"]], [["O"]])
    assert (nothing_anywhere["f1"], nothing_anywhere["macro_f1"], nothing_anywhere["accuracy"]) == (
        0.0,
        0.0,
        1.0,
    )
    for empty in ([], [[]]):
        metrics = entity_metrics(empty, empty)
        assert metrics.keys() == nothing_anywhere.keys()
        assert all(math.isnan(value) for value in metrics.values())
        assert entity_table(empty, empty) == ()


def test_every_word_has_one_predicted_tag() -> None:
    with pytest.raises(AssertionError, match="one predicted tag per word"):
        entity_metrics([["O"]], [["O", "O"]])
    with pytest.raises(AssertionError, match="one predicted tag per word"):
        entity_table([["O"]], [["O", "O"]])
