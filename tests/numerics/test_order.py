"""Which rows a step sees: a pure function of seed and position, whatever the ranks and micro-batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from objective_cases import (
    ACCUMULATED,
    CASES,
    RANKS,
    SGD,
    WHOLE,
    Layout,
    Run,
    assert_same_curves,
    assert_same_weights,
    open_stream,
    recipe,
)
from tunesmith.data.order import Order, Salt, Segment, deal
from tunesmith.data.stream import Stream
from tunesmith.data.table import Encoded

LENGTHS = np.random.default_rng(0).integers(1, 60, 1000)


def rows_of(stream: Stream, step: int, world_size: int) -> list[int]:
    cells = stream.cells(step, world_size)
    return sorted(row for ranks in cells for cell in ranks for sequence in cell for row in sequence)


@pytest.mark.parametrize("data", [{}, {"group_by_length": True}, {"packing": True}, {"shuffle": False}])
def test_a_steps_rows_do_not_hang_on_ranks_and_micro_batches(workshop: Path, data: dict[str, bool]) -> None:
    streams = [
        open_stream(recipe(workshop, CASES["causal_lm"], SGD, Layout(size), 9, data=data), workshop)
        for size in (16, 3, 2)
    ]
    for step in range(9):
        expected = sorted(int(row) for row in streams[0].window(step))
        for stream in streams:
            for world_size in (1, 2, 3, 5):
                assert rows_of(stream, step, world_size) == expected


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_row_once(lengths: np.ndarray | None, shuffle: bool) -> None:
    order = Order((Segment(0, 700), Segment(700, 1000)), 32, 5, shuffle, lengths)
    for epoch in range(3):
        windows = order.epoch(epoch)
        assert len(windows) == order.steps_per_epoch == 32
        assert sorted(map(len, windows)) == [8, *[32] * 31]
        assert np.array_equal(np.sort(np.concatenate(windows)), np.arange(1000))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def flat(seed: int, epoch: int) -> list[int]:
        # another object each time: nothing is carried along
        return np.concatenate(Order((Segment(0, 1000),), 32, seed).epoch(epoch)).tolist()

    seen = {(seed, epoch): flat(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 7)}
    assert all(flat(*key) == rows for key, rows in seen.items())
    assert len({tuple(rows) for rows in seen.values()}) == 6
    assert Order((Segment(0, 1000),), 32, 0, shuffle=False).epoch(3)[0].tolist() == list(range(32))


def test_any_step_can_be_asked_for_first(workshop: Path) -> None:
    made = recipe(workshop, CASES["masked_lm"], SGD, Layout(4), 20)
    through, jumping = open_stream(made, workshop), open_stream(made, workshop)
    whole = [through.batches(step, 0, 2, prefetch=step < 19) for step in range(20)]
    for step in (17, 2, 9):
        for batch, expected in zip(jumping.batches(step, 0, 2, prefetch=False), whole[step], strict=True):
            assert batch.rows == expected.rows
            assert batch.inputs["input_ids"].equal(expected.inputs["input_ids"])
            assert batch.targets["labels"].equal(expected.targets["labels"])


def test_masks_are_drawn_afresh_each_epoch_and_do_not_hang_on_the_cell(workshop: Path) -> None:
    made = recipe(workshop, CASES["masked_lm"], SGD, Layout(16), 20)
    stream = open_stream(made, workshop)

    def labels(epoch: int, cell: list[int]) -> list[list[int]]:
        batch = stream.batch([[row] for row in cell], epoch, 0)
        lengths = stream.dataset.table.lengths()[cell]
        return [row[:n].tolist() for row, n in zip(batch.targets["labels"], lengths, strict=True)]

    longest = np.argsort(-stream.dataset.table.lengths())[:4].tolist()
    assert labels(0, longest) == [labels(0, [row])[0] for row in longest]
    assert all(a != b for a, b in zip(labels(0, longest), labels(1, longest), strict=True))


def test_weights_draw_rows_as_documented() -> None:
    half, double, one = Segment(0, 301, 0.5), Segment(301, 400, 2.0), Segment(400, 500, 1.0)
    order = Order((half, double, one), 16, seed=2)
    epochs = [Counter(np.concatenate(order.epoch(epoch)).tolist()) for epoch in range(8)]
    assert {order.rows_per_epoch} == {sum(rows.values()) for rows in epochs} == {150 + 198 + 100}
    for rows in epochs:
        assert {rows[row] for row in range(301, 400)} == {2}
        assert {rows[row] for row in range(400, 500)} == {1}
        assert max(rows[row] for row in range(301)) == 1
    halves = [{row for row in rows if row < 301} for rows in epochs]
    assert {len(rows) for rows in halves} == {150}, "half of the rows, each at most once"
    assert len(halves[0] & halves[1]) == 0, "a fresh half"
    times = Counter(row for rows in halves for row in rows)
    assert {times[row] for row in range(301)} <= {3, 4}, "1200 draws of 301 rows, as even as it goes"


@pytest.mark.parametrize("items", [1, 2, 3, 9, 16, 17, 31])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("per_device", [1, 2, 5, 64])
def test_a_window_is_dealt_evenly(items: int, world_size: int, per_device: int) -> None:
    cells = deal(range(items), world_size, per_device)
    sizes = [len(cell) for ranks in cells for cell in ranks]
    assert [item for ranks in cells for cell in ranks for item in cell] == list(range(items))
    assert {len(ranks) for ranks in cells} == {world_size}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= per_device
    assert len(cells) == -(-items // (world_size * per_device)), "as few micro-steps as it goes"


@pytest.mark.parametrize("case", CASES)
def test_a_filler_has_no_units(workshop: Path, case: str) -> None:
    stream = open_stream(recipe(workshop, CASES[case], SGD, Layout(4), 3), workshop)
    filler = stream.batch([], 0, fallback=0)
    assert [term.units(filler) for term in stream.objective.terms] == [0] * len(stream.objective.terms)
    assert (filler.samples, filler.tokens) == (0, 0)


def test_transforms_see_every_training_row_with_a_key_of_its_own(workshop: Path) -> None:
    made = recipe(workshop, CASES["masked_lm"], SGD, Layout(4), 20)
    plain = open_stream(made, workshop)
    seen: list[tuple[int, ...]] = []

    def first_token(row: Encoded, key: tuple[int, ...]) -> Encoded:
        seen.append(key)
        return {name: value[:1] if np.ndim(value) else value for name, value in row.items()}

    stream = Stream(plain.dataset, plain.order, plain.objective, plain.per_device, None, [first_token])
    batches = stream.batches(0, 0, 1, prefetch=False)
    assert {batch.inputs["input_ids"].shape[1] for batch in batches} == {1}
    assert [key[2] for key in seen] == [row for batch in batches for row in batch.rows]
    assert {(key[0], key[1], key[3]) for key in seen} == {(plain.order.seed, 0, int(Salt.TRANSFORM))}


DRAWN: dict[str, Any] = {
    "sampling": {"type": "balanced"},
    "curriculum": {"by": "length", "pace": {"type": "root", "until": 0.5}},
}


@pytest.mark.parametrize("layout", [ACCUMULATED, RANKS], ids=str)
def test_what_is_drawn_by_label_and_by_length_gives_the_same_curve(train: Run, layout: Layout) -> None:
    found, whole = (train("single_label", SGD, one, 8, data=DRAWN) for one in (layout, WHOLE))
    assert_same_curves(found, whole)
    assert_same_weights(found, whole)
