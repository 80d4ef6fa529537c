"""data.sampling: how often the rows of each label come, against counts by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from tests.numerics.objective_cases import CASES, SGD, Layout, open_stream, recipe
from tunesmith.data.order import Group, Order, Segment
from tunesmith.data.sampling import NO_LABEL, Labels, apportion, row_labels, sampled
from tunesmith.errors import UserError
from tunesmith.recipe.sampling import Sampling
from tunesmith.run import Resume, run

COUNTS = (600, 300, 90, 10)
IDS = np.repeat(np.arange(4), COUNTS)
LABELS = Labels(IDS, ("a", "b", "c", "d", NO_LABEL))
ALL: list[dict[str, Any]] = [
    {"type": "balanced"},
    {"type": "square_root"},
    {"type": "temperature", "temperature": 5.0},
    {"type": "oversample", "ratio": 0.5},
    {"type": "undersample", "ratio": 3.0},
]


def settings(values: dict[str, Any]) -> Sampling:
    return TypeAdapter[Sampling](Sampling).validate_python(values)


def drawn(values: dict[str, Any], *segments: Segment, seed: int = 0, window: int = 32) -> Order:
    groups, _ = sampled(settings(values), segments or (Segment(0, 1000),), LABELS)
    return Order(groups, window, seed)


def per_label(order: Order, epoch: int) -> list[int]:
    rows = np.concatenate(order.epoch(epoch))
    return np.bincount(IDS[rows], minlength=4).tolist()


def shares(power: float) -> list[float]:
    weights = [count**power for count in COUNTS]
    return [1000 * weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (ALL[0], [250.0] * 4),
        (ALL[1], shares(0.5)),
        (ALL[2], shares(0.2)),
        (ALL[3], [600.0, 300.0, 300.0, 300.0]),
        (ALL[4], [30.0, 30.0, 30.0, 10.0]),
    ],
)
def test_rows_of_each_label_in_an_epoch(values: dict[str, Any], expected: list[float]) -> None:
    order = drawn(values)
    for epoch in (0, 1, 5):
        found = per_label(order, epoch)
        assert all(abs(n - x) < 1 for n, x in zip(found, expected, strict=True))
        assert sum(found) == order.rows_per_epoch == round(sum(expected))


@pytest.mark.parametrize("values", ALL)
def test_no_row_comes_more_often_than_another_of_its_label_by_more_than_one(values: dict[str, Any]) -> None:
    """Over any number of epochs from the first on: that is the least noise that whole draws allow."""
    order = drawn(values)
    counts = np.zeros(1000, dtype=np.int64)
    for epoch in range(8):
        rows, times = np.unique(np.concatenate(order.epoch(epoch)), return_counts=True)
        counts[rows] += times
        for label in range(4):
            of_label = counts[label == IDS]
            assert of_label.max() - of_label.min() <= 1


@pytest.mark.parametrize("values", ALL)
def test_the_order_is_a_function_of_seed_and_epoch(values: dict[str, Any]) -> None:
    def flat(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(np.concatenate(drawn(values, seed=seed).epoch(epoch)).tolist())

    assert flat(1, 3) == flat(1, 3)
    assert len({flat(seed, epoch) for seed in (0, 1) for epoch in (0, 3)}) == 4


def test_weights_of_sources_shift_the_shares_within_a_label() -> None:
    """Every second row of each label comes from a source of weight 3."""
    names = ("a", "b")
    labels = Labels(np.array([0] * 300 + [1] * 30 + [0] * 300 + [1] * 30), (*names, NO_LABEL))
    segments = (Segment(0, 330, 3.0), Segment(330, 660, 1.0))
    groups, facts = sampled(settings({"type": "balanced"}), segments, labels)
    assert facts == {"a": {"rows": 1200.0, "drawn": 660}, "b": {"rows": 120.0, "drawn": 660}}
    rows = np.concatenate(Order(groups, 32, 0).epoch(0))
    of_source = Counter((int(labels.ids[row]), row < 330) for row in rows.tolist())
    assert of_source == {(0, True): 495, (0, False): 165, (1, True): 495, (1, False): 165}


def test_rows_that_would_never_come_are_refused() -> None:
    labels = Labels(np.array([0] * 100 + [0] + [1] * 10), ("a", "b", NO_LABEL))
    segments = (Segment(0, 100, 1.0), Segment(100, 101, 2.0), Segment(101, 111, 1.0))
    with pytest.raises(UserError, match="the 1 rows of label a with weight 2 would never be drawn"):
        sampled(settings({"type": "undersample"}), segments, labels)


def test_one_label_cannot_be_sampled() -> None:
    labels = Labels(np.zeros(5, dtype=np.int64), ("a", NO_LABEL))
    with pytest.raises(UserError, match="all training rows have the label a"):
        sampled(settings({"type": "balanced"}), (Segment(0, 5),), labels)


@pytest.mark.parametrize("total", [0, 1, 7, 1000, 12345])
def test_apportioned_rows_are_all_of_them_and_near_their_quotas(total: int) -> None:
    for seed in range(20):
        weights = np.random.default_rng(seed).random(9) + 1e-3
        found = apportion(weights, total)
        assert found.sum() == total
        assert np.abs(found - total * weights / weights.sum()).max() < 1


def test_oversampled_copies_come_whole_before_the_fraction() -> None:
    group = Group(np.arange(10), 27)
    for epoch in range(4):
        assert set(Counter(group.draw(3, epoch).tolist()).values()) == {2, 3}


@pytest.mark.parametrize(
    "values",
    [
        {"type": "temperature", "temperature": 0.5},
        {"type": "oversample", "ratio": 1.5},
        {"type": "undersample", "ratio": 0.5},
        {"type": "balanced", "ratio": 1.0},
        {"type": "even"},
    ],
)
def test_settings_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings(values)


@pytest.mark.parametrize("case", ["causal_lm", "masked_lm", "seq2seq_t5", "question_answering"])
def test_objectives_without_labels_are_refused(workshop: Path, case: str) -> None:
    with pytest.raises(ValidationError, match=r"data\.sampling: draws rows by their label"):
        recipe(workshop, CASES[case], SGD, Layout(4), 2, data={"sampling": {"type": "balanced"}})


def test_numbers_are_refused_when_they_are_seen(workshop: Path) -> None:
    made = recipe(workshop, CASES["regression"], SGD, Layout(4), 2, data={"sampling": {"type": "balanced"}})
    with pytest.raises(UserError, match="these rows have numbers"):
        open_stream(made, workshop)


def test_of_several_labels_the_rarest_counts(workshop: Path) -> None:
    made = recipe(workshop, CASES["multi_label"], SGD, Layout(4), 2)
    stream = open_stream(made, workshop)
    labels = row_labels(stream.objective, stream.dataset.table)
    given = [row.tolist() for row in stream.dataset.table.column("labels")]
    counts = Counter(label for row in given for label in row)
    for row, found in zip(given, labels.ids.tolist(), strict=True):
        if not row:
            assert labels.names[found] == NO_LABEL
        else:
            assert found in row
            assert counts[found] == min(counts[label] for label in row)


def test_sentences_are_drawn_by_their_rarest_entity(workshop: Path) -> None:
    made = recipe(workshop, CASES["token_classification"], SGD, Layout(4), 2)
    stream = open_stream(made, workshop)
    labels = row_labels(stream.objective, stream.dataset.table)
    tags: list[str] = stream.objective.labels  # pyright: ignore[reportAttributeAccessIssue]
    for row, found in zip(stream.dataset.table.column("tags"), labels.ids.tolist(), strict=True):
        types = {tags[tag][2:] for tag in row} - {""}
        assert labels.names[found] in (types or {NO_LABEL})


@pytest.mark.parametrize("data", [{}, {"group_by_length": True}])
@pytest.mark.parametrize("values", ALL)
def test_a_steps_rows_do_not_hang_on_the_world_size(
    workshop: Path, values: dict[str, Any], data: dict[str, Any]
) -> None:
    streams = [
        open_stream(
            recipe(workshop, CASES["pairs"], SGD, Layout(size), 9, data={"sampling": values, **data}),
            workshop,
        )
        for size in (16, 3)
    ]
    for step in range(6):
        expected = sorted(streams[0].window(step).tolist())
        for stream in streams:
            for world_size in (1, 2, 5):
                cells = stream.cells(step, world_size)
                found = [row for ranks in cells for cell in ranks for sequence in cell for row in sequence]
                assert sorted(found) == expected


def test_copies_of_a_row_get_other_randomness_at_any_world_size(workshop: Path) -> None:
    """A source of weight 40 puts a row into one window several times."""
    made = recipe(workshop, CASES["masked_lm"], SGD, Layout(4), 2)
    source = made.data.train[0].model_copy(update={"weight": 40.0, "limit": 2})
    data = made.data.model_copy(update={"train": [source]})
    stream = open_stream(made.model_copy(update={"data": data}), workshop)
    seen: dict[int, list[tuple[int, ...]]] = {}
    for world_size in (1, 2, 3):
        batches = [b for r in range(world_size) for b in stream.batches(0, r, world_size, prefetch=False)]
        seen[world_size] = sorted(
            (row, int(draw))
            for batch in batches
            if batch.draws is not None
            for row, draw in zip(batch.rows, batch.draws, strict=True)
            if row >= 0
        )
    assert seen[1] == seen[2] == seen[3]
    assert len(set(seen[1])) == len(seen[1]) == 16
    assert len({row for row, _ in seen[1]}) == 2


def test_a_run_says_what_it_draws(workshop: Path) -> None:
    made = recipe(
        workshop, CASES["single_label"], SGD, Layout(16), 3, data={"sampling": {"type": "balanced"}},
        run_name="balanced",
    )  # fmt: skip
    run(made, workshop, Resume())
    about = json.loads((workshop / "runs" / "balanced" / "environment.json").read_text())
    found = about["facts"]["sampling"]
    assert len({label["drawn"] for label in found.values()}) <= 2
    assert sum(label["drawn"] for label in found.values()) == sum(label["rows"] for label in found.values())
