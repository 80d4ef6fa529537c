"""data.curriculum and data.max_length_schedule: what may be drawn at a step, and that it is drawn fairly."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import AutoTokenizer

from tests.numerics.objective_cases import CASES, SGD, Layout, open_stream, recipe
from tunesmith.commands.finished import open_run
from tunesmith.data.curriculum import EasyFirst, Limits, Pace
from tunesmith.data.order import Order, Segment
from tunesmith.data.prepare import prepare
from tunesmith.data.reference_loss import row_losses
from tunesmith.errors import UserError
from tunesmith.recipe import Recipe
from tunesmith.recipe.curriculum import Pace as PaceSettings
from tunesmith.run import Resume, run
from tunesmith.tokenizer import save_tokenizer, tokenizer_hash

ROWS, WINDOW = 1000, 16
STEPS = -(-ROWS // WINDOW)
DIFFICULTY = np.random.default_rng(1).permutation(ROWS).astype(np.float64)
LENGTHS = np.random.default_rng(2).integers(4, 60, ROWS)


def pace(kind: str, start: float = 0.1, until: int = 40, **more: Any) -> Pace:
    values = {"type": kind, "start_fraction": start, **more}
    return Pace(TypeAdapter[Any](PaceSettings).validate_python(values), until)


def order(selection: EasyFirst, window: int = WINDOW, seed: int = 0) -> Order:
    return Order((Segment(0, ROWS),), window, seed, True, None, selection)


@pytest.mark.parametrize(
    ("kind", "more", "middle"),
    [
        ("linear", {}, 0.55),
        ("root", {"power": 2.0}, (0.5 * (0.01 + 1)) ** 0.5),
        ("root", {"power": 3.0}, (0.5 * (0.001 + 1)) ** (1 / 3)),
        ("geometric", {}, 0.1**0.5),
    ],
)
def test_competence_grows_as_its_formula_says(kind: str, more: dict[str, Any], middle: float) -> None:
    made = pace(kind, **more)
    assert made.competence(0) == pytest.approx(0.1)
    assert made.competence(20) == pytest.approx(middle)
    assert [made.competence(step) for step in (40, 41, 1000)] == [1.0] * 3
    curve = [made.competence(step) for step in range(41)]
    assert curve == sorted(curve)


@pytest.mark.parametrize("kind", ["linear", "root", "geometric"])
def test_a_step_draws_from_the_easiest_part_and_each_row_at_most_once(kind: str) -> None:
    made = pace(kind, until=150)
    steps = order(EasyFirst(DIFFICULTY, made, LENGTHS, None))
    for step in range(0, 3 * STEPS):
        window = steps.epoch(step // STEPS)[step % STEPS]
        assert len(set(window.tolist())) == len(window)
        allowed = max(len(window), int(np.ceil(round(made.competence(step) * ROWS, 9))))
        assert DIFFICULTY[window].max() < allowed


def test_windows_are_uniform_over_what_may_be_drawn() -> None:
    """The mean rank in a window is half the competence; no row of the easiest part waits while others come twice."""
    made = pace("linear", start=0.2, until=STEPS)
    ranks, expected, spread = [], [], []
    windows: list[Any] = []
    for seed in range(30):
        windows = order(EasyFirst(DIFFICULTY, made, LENGTHS, None), seed=seed).epoch(0)
        for step, window in enumerate(windows):
            ranks.append(DIFFICULTY[window].mean() / ROWS)
            expected.append(made.competence(step) / 2)
            spread.append(made.competence(step) / (12 * len(window)) ** 0.5)
    z = (np.array(ranks) - np.array(expected)) / np.array(spread)
    assert abs(z.mean()) < 5 / len(z) ** 0.5
    counts = Counter(int(row) for window in windows for row in window)
    easiest = [counts[int(row)] for row in np.flatnonzero(DIFFICULTY < 0.2 * ROWS)]
    assert max(easiest) - min(easiest) <= 1


def test_epochs_keep_their_number_of_rows_and_the_curriculum_ends() -> None:
    steps = order(EasyFirst(DIFFICULTY, pace("root", until=STEPS), LENGTHS, None))
    plain = Order((Segment(0, ROWS),), WINDOW, 0)
    assert [len(w) for w in steps.epoch(0)] == [len(w) for w in plain.epoch(0)]
    assert all(np.array_equal(a, b) for a, b in zip(steps.epoch(1), plain.epoch(1), strict=True))


def test_any_step_can_be_asked_for_first() -> None:
    def at(step: int) -> list[int]:
        fresh = order(EasyFirst(DIFFICULTY, pace("linear", until=100), LENGTHS, None))
        return fresh.epoch(step // STEPS)[step % STEPS].tolist()

    through = order(EasyFirst(DIFFICULTY, pace("linear", until=100), LENGTHS, None))
    windows = [window.tolist() for epoch in (0, 1) for window in through.epoch(epoch)]
    assert [at(step) for step in (90, 3, 64)] == [windows[step] for step in (90, 3, 64)]


def test_long_rows_wait_for_their_stage() -> None:
    limits = Limits(((10, 16), (30, 32)), 64, cut=False)
    steps = order(EasyFirst(DIFFICULTY, pace("linear", until=40), LENGTHS, limits))
    windows = steps.epoch(0)
    assert max(LENGTHS[window].max() for window in windows[:10]) <= 16
    assert 16 < max(LENGTHS[window].max() for window in windows[10:30]) <= 32
    assert max(LENGTHS[window].max() for window in windows[30:]) > 32
    # the easiest part is that of the rows which are short enough
    short = np.sort(DIFFICULTY[LENGTHS <= 16])
    assert max(DIFFICULTY[windows[0]]) <= short[max(WINDOW, int(np.ceil(0.1 * len(short)))) - 1]


def test_too_few_short_rows_are_filled_up_with_the_next_longer_ones() -> None:
    few = np.where(np.arange(ROWS) < 5, 4, 40)
    steps = order(EasyFirst(np.zeros(ROWS), None, few, Limits(((10, 8),), 64, cut=False)))
    assert all(len(set(window.tolist())) == WINDOW for window in steps.epoch(0)[:10])


@pytest.mark.parametrize("direction", ["easy_first", "hard_first"])
def test_rows_come_by_length(workshop: Path, direction: str) -> None:
    curriculum = {
        "by": "length", "direction": direction, "pace": {"type": "linear", "start_fraction": 0.2, "until": 9}
    }  # fmt: skip
    made = recipe(workshop, CASES["sft"], SGD, Layout(4), 12, data={"curriculum": curriculum})
    stream = open_stream(made, workshop)
    lengths = stream.dataset.table.lengths()
    ordered = np.sort(lengths)
    window = lengths[stream.window(0)]
    rows = max(16, int(np.ceil(0.2 * len(lengths))))
    if direction == "easy_first":
        assert window.max() <= ordered[rows - 1]
    else:
        assert window.min() >= ordered[-rows]


def test_rows_come_by_a_column(workshop: Path, tmp_path: Path) -> None:
    lines = [
        {"text": f"w{i % 40} w{i % 7}", "label": "ab"[i % 2], "hard": str((i * 37) % 100)} for i in range(100)
    ]
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curriculum = {
        "by": "column",
        "column": "hard",
        "pace": {"type": "linear", "start_fraction": 0.3, "until": 5},
    }
    data = {"train": [{"path": str(path), "format": "classification"}], "curriculum": curriculum}
    made = recipe(workshop, CASES["single_label"], SGD, Layout(4), 8, data=data)
    stream = open_stream(made, workshop)
    assert all(int(lines[row]["hard"]) < 30 for row in stream.window(0).tolist())
    wrong = {**data, "curriculum": {**curriculum, "column": "label"}}
    with pytest.raises(UserError, match=r"scored.jsonl:1.*'a' is not a number"):
        open_stream(recipe(workshop, CASES["single_label"], SGD, Layout(4), 8, data=wrong), workshop)
    missing = {**data, "curriculum": {**curriculum, "column": "none"}}
    with pytest.raises(UserError, match=r"there is no column 'none'"):
        open_stream(recipe(workshop, CASES["single_label"], SGD, Layout(4), 8, data=missing), workshop)


@pytest.mark.parametrize(
    "case", ["single_label", "causal_lm", "token_classification", "seq2seq_t5", "masked_lm"]
)
def test_the_losses_of_a_reference_are_those_of_its_rows_alone(trained: Any, case: str) -> None:
    """Against a forward per row without padding."""
    finished = open_run(trained(case))
    dataset = prepare(finished.recipe.data, Path(), finished.objective, tokenizer_hash(finished.tokenizer))[
        "eval"
    ]
    found = row_losses(finished.engine.train_module, dataset.table, torch.device("cpu"))
    for row in range(0, len(dataset), 5):
        drawn = finished.objective.draw(dataset.table.row(row), (0, 0, row, 10))
        batch = finished.objective.collate([drawn], [row])
        with torch.no_grad():
            sums = finished.engine.train_module(batch, "predict").sums
        units = torch.tensor([max(1, term.units(batch)) for term in finished.objective.terms])
        weights = torch.tensor([term.weight for term in finished.objective.terms])
        assert found[row] == pytest.approx(float((weights * sums / units).sum()), rel=1e-4, abs=1e-6)


def test_a_run_by_the_loss_of_a_finished_one(workshop: Path, trained: Any, make_recipe: Any) -> None:
    reference = trained("single_label")
    curriculum = {"by": "loss", "reference": str(reference), "pace": {"type": "root", "until": 2}}
    made = make_recipe("single_label", data={"curriculum": curriculum}, run_name="by-loss")
    run(made, workshop, Resume())
    (cached,) = (workshop / "cache").glob("losses-*.npy")
    losses = np.load(cached)
    stream = open_stream(made, workshop)
    ordered = np.sort(losses)
    size = len(stream.window(0))
    assert losses[stream.window(0)].max() <= ordered[max(size, int(np.ceil(0.05 * len(losses)))) - 1]
    other = make_recipe("pairs", data={"curriculum": curriculum}, run_name="by-loss-of-another")
    with pytest.raises(UserError, match=r"data\.curriculum\.reference: .* (other labels|another tokenizer)"):
        open_stream(other, workshop)
    nowhere = {**curriculum, "reference": str(workshop / "nothing")}
    with pytest.raises(UserError, match=r"data\.curriculum\.reference: .*not the folder of a run"):
        open_stream(make_recipe("single_label", data={"curriculum": nowhere}), workshop)


def test_how_rows_were_cut_last_is_no_part_of_a_tokenizer(workshop: Path, tmp_path: Path) -> None:
    """A run that encodes its rows saves the tokenizer with the length that it cut them to."""
    tokenizer: Any = AutoTokenizer.from_pretrained(workshop / "models" / "bert_mlm")
    before = tokenizer_hash(tokenizer)
    tokenizer("amber river stone", truncation=True, max_length=4, padding="max_length")
    tokenizer.save_pretrained(tmp_path)
    saved: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.backend_tokenizer.truncation["max_length"] == 4
    assert tokenizer_hash(tokenizer) == tokenizer_hash(saved) == before
    assert saved.backend_tokenizer.truncation["max_length"] == 4


def test_a_saved_tokenizer_is_the_same_whether_it_cut_rows_or_not(workshop: Path, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(workshop / "models" / "bert_mlm")
    save_tokenizer(tokenizer, tmp_path / "fresh")
    tokenizer("amber river stone", truncation=True, max_length=4, padding="max_length")
    save_tokenizer(tokenizer, tmp_path / "used")
    fresh, used = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("fresh", "used"))
    assert fresh == used


@pytest.mark.parametrize("packing", [False, True])
def test_rows_of_a_causal_lm_are_cut_while_they_are_to_be_short(workshop: Path, packing: bool) -> None:
    schedule = {"stages": [{"until": 3, "max_length": 6}, {"until": 5, "max_length": 9}], "longer": "cut"}
    data = {"max_length_schedule": schedule, "packing": packing}
    made = recipe(workshop, CASES["causal_lm"], SGD, Layout(4), 8, data=data)
    stream, plain = (
        open_stream(made, workshop),
        open_stream(recipe(workshop, CASES["causal_lm"], SGD, Layout(4), 8), workshop),
    )
    assert stream.steps_per_epoch == plain.steps_per_epoch
    for step, limit in ((0, 6), (2, 6), (3, 9), (5, 64)):
        assert stream.window(step).tolist() == plain.window(step).tolist()
        lengths = np.minimum(stream.dataset.table.lengths()[stream.window(step)], limit)
        batches = stream.batches(step, 0, 1, prefetch=False)
        assert sum(batch.tokens for batch in batches) == lengths.sum()
        if not packing:
            assert max(batch.inputs["input_ids"].shape[1] for batch in batches) == lengths.max()


def test_a_stage_without_enough_rows_is_refused(workshop: Path) -> None:
    data = {"max_length_schedule": {"stages": [{"until": 3, "max_length": 2}]}}
    with pytest.raises(UserError, match=r"rows have at most 2 tokens, fewer than a step's 16"):
        open_stream(recipe(workshop, CASES["sft"], SGD, Layout(4), 8, data=data), workshop)


LINEAR = {"type": "linear", "until": 0.5}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"curriculum": {"by": "length", "pace": LINEAR}, "shuffle": False}, "shuffle: false exclude each other"),
        ({"curriculum": {"by": "length", "pace": {**LINEAR, "until": 99}}}, "is behind training.max_steps: 8"),
        ({"max_length_schedule": {"stages": [{"until": 3, "max_length": 64}]}}, "must be below data.max_length"),
        (
            {"max_length_schedule": {"stages": [{"until": 3, "max_length": 8}, {"until": 3, "max_length": 9}]}},
            "must be later",
        ),
        (
            {"max_length_schedule": {"stages": [{"until": 3, "max_length": 8}], "longer": "cut"}},
            "cut is for causal_lm",
        ),
    ],
)  # fmt: skip
def test_what_excludes_each_other(workshop: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(workshop, CASES["sft"], SGD, Layout(4), 8, data=data)


def test_moments_of_different_kinds_are_compared_in_steps(workshop: Path) -> None:
    data = {
        "max_length_schedule": {"stages": [{"until": 0.9, "max_length": 20}, {"until": 3, "max_length": 30}]}
    }
    with pytest.raises(UserError, match="a stage until step 3 comes behind one until step 8"):
        open_stream(recipe(workshop, CASES["sft"], SGD, Layout(4), 8, data=data), workshop)


def test_a_stopped_curriculum_goes_on_bit_by_bit(workshop: Path) -> None:
    data = {
        "curriculum": {"by": "length", "pace": {"type": "root", "until": 0.75}},
        "sampling": {"type": "balanced"},
    }
    whole = recipe(
        workshop, CASES["single_label"], SGD, Layout(4), 8, data=data, run_name="curriculum-whole",
        checkpoint={"final": "last", "save_steps": 3, "save_total_limit": 4},
    )  # fmt: skip
    run(whole, workshop, Resume())
    again = whole.model_copy(update={"run_name": "curriculum-again"})
    folder = workshop / "runs" / "curriculum-again"
    folder.mkdir()
    source = workshop / "runs" / "curriculum-whole"
    shutil.copytree(source / "checkpoint-3", folder / "checkpoint-3")
    for name in ("recipe.yaml", "objective.json"):
        shutil.copy(source / name, folder / name)
    shutil.copy(source / "metrics.jsonl", folder / "metrics.jsonl")
    run(again, workshop, Resume(resume=True))
    a, b = (w / "final" / "model.safetensors" for w in (source, folder))
    assert a.read_bytes() == b.read_bytes()


def test_several_tasks_share_the_steps(workshop: Path) -> None:
    """What goes by the run's steps, or is decided at its end, is for one task."""
    paths = {name: str(workshop / "data" / f"{name}.jsonl") for name in ("single", "pair")}
    tasks: dict[str, Any] = {
        name: {
            "data": {"train": [{"path": path, "format": "classification" if name == "single" else "pairs"}]},
            "objective": {"type": "classification"},
        }
        for name, path in paths.items()
    }
    tasks["single"]["data"]["curriculum"] = {"by": "length"}
    values = {
        "model": {"model_name_or_path": "tiny"},
        "tasks": tasks,
        "evaluation": {"calibrate": "temperature"},
        "run_name": "several",
    }
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(values)
    assert "tasks.single.data.curriculum: goes by the steps of the run" in str(caught.value)
    assert "evaluation.calibrate: is for a run of one task" in str(caught.value)
