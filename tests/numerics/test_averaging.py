"""Averages of the weights on every engine: by hand, swapped in and back, saved and continued, through whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_ranks import Bench, EngineRanks, bench
from objective_cases import ADAMW, CASES, OFFLOADED, SGD, SHARDED, SPLIT, TWO, apart, recipe
from tunesmith.averaging import Average, build_average
from tunesmith.checkpoint.run_state import RunState
from tunesmith.checkpoint.state import Progress
from tunesmith.checkpoint.store import find_latest
from tunesmith.errors import UserError
from tunesmith.loss_scale import LossScale
from tunesmith.recipe import Recipe

ENGINES: dict[str, dict[str, Any]] = {
    "single": {"strategy": "single"},
    "ddp": {"strategy": "ddp"},
    **SHARDED,
    **OFFLOADED,
    "tensor": SPLIT,
}
EMA = {"type": "ema", "decay": 0.7, "warmup": False, "start": 2}
SWA = {"type": "swa", "start": 3}
STEPS = 6
FAST = {"single", "zero2", "zero3", "fsdp2"}


def some_slow(names: Any) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def ranks() -> Iterator[EngineRanks]:
    made = EngineRanks.start(2)
    yield made
    made.stop()


def asked(
    workshop: Path, strategy: str, averaging: dict[str, Any], optimizer: dict[str, Any] = SGD, **sections: Any
) -> Recipe:
    return recipe(
        workshop, CASES["sft"], optimizer, TWO, STEPS,
        parallel=ENGINES[strategy], averaging=averaging, **sections,
    )  # fmt: skip


def average_of(on: Bench) -> Average:
    settings = on.recipe.averaging
    assert settings is not None
    made = build_average(settings, on.engine.train_module.model, STEPS, on.stream.steps_per_epoch)
    (average,) = made.steps
    assert isinstance(average, Average)
    average.begin(on.engine, on.stream)
    return average


def steps(on: Bench, average: Average, first: int, last: int) -> Iterator[int]:
    for step in range(first, last):
        on.gradients(step)
        on.update(step)
        average.after_step(step, torch.zeros((), device=on.engine.device))
        yield step


def trained(made: Recipe, base: Path) -> dict[str, Any]:
    """The weights after every step, the average at the end, what a swap changes and what it leaves."""
    with bench(made, base) as on:
        average = average_of(on)
        found: dict[str, Any] = {"weights": [on.whole() for _ in steps(on, average, 0, STEPS)]}
        found["loss"] = on.loss(0)
        with average.swapped():
            found["average"] = on.whole()
            found["averaged loss"] = on.loss(0)
        found["back"] = on.whole()
        found["loss again"] = on.loss(0)
        found["trained on"] = on.gradients(0)
        on.update(0)
        average.settle()
        found["settled"] = on.whole()
        found["settled loss"] = on.loss(0)
        return found


def on_ranks(ranks: EngineRanks, strategy: str, function: Any, *args: Any) -> Any:
    return function(*args) if strategy == "single" else ranks.call(function, *args)[0]


@pytest.mark.parametrize("strategy", some_slow(ENGINES))
def test_every_engine_averages_what_it_trains(workshop: Path, ranks: EngineRanks, strategy: str) -> None:
    averages_what_it_trains(workshop, ranks, strategy, EMA)


@pytest.mark.parametrize("strategy", some_slow(["single", "ddp", "zero3", "fsdp2"]))
def test_engines_take_the_mean_of_what_they_train(workshop: Path, ranks: EngineRanks, strategy: str) -> None:
    averages_what_it_trains(workshop, ranks, strategy, SWA)


def averages_what_it_trains(
    workshop: Path, ranks: EngineRanks, strategy: str, averaging: dict[str, Any]
) -> None:
    found = on_ranks(ranks, strategy, trained, asked(workshop, strategy, averaging), workshop)
    weights: list[dict[str, Tensor]] = found["weights"]
    for name, average in found["average"].items():
        if averaging is SWA:
            expected = torch.stack([weights[done - 1][name].double() for done in range(3, 7)]).mean(0)
        else:
            expected = weights[1][name].double()
            for done in range(3, 7):
                expected = 0.7 * expected + 0.3 * weights[done - 1][name].double()
        if float((weights[-1][name] - weights[0][name]).norm()) > 0:
            assert not average.equal(weights[-1][name]), name
        assert float((average - expected).norm() / expected.norm()) < 1e-6, name
        assert found["back"][name].equal(weights[-1][name]), name
    assert found["loss again"] == found["loss"]
    assert apart(found["averaged loss"], found["loss"]) > 1e-4
    assert apart(found["trained on"], found["loss"]) < 1e-5
    assert found["settled"].keys() == found["average"].keys()


@pytest.mark.parametrize("strategy", some_slow(["ddp", *SHARDED]))
def test_the_average_is_that_of_one_process(workshop: Path, ranks: EngineRanks, strategy: str) -> None:
    alone = trained(asked(workshop, "single", EMA), workshop)
    found = ranks.call(trained, asked(workshop, strategy, EMA), workshop)[0]
    assert apart(found["averaged loss"], alone["averaged loss"]) < 1e-5
    assert apart(found["settled loss"], alone["settled loss"]) < 1e-5
    for name, average in found["average"].items():
        expected = alone["average"][name]
        assert float((average - expected).norm() / expected.norm()) < 1e-5, name


def state_of(on: Bench, average: Average | None) -> RunState:
    scale = LossScale(False, on.engine.device)
    parts = {} if average is None else {average.name: average}
    return RunState(on.engine, Progress(), scale, None, {}, {}, parts)


def saved(
    made: Recipe, base: Path, run_dir: Path, at: int, *, with_average: bool = True
) -> dict[str, Tensor]:
    """Saves after step `at`, goes on, and gives the last average."""
    with bench(made, base) as on:
        average = average_of(on)
        state = state_of(on, average if with_average else None)
        for step in steps(on, average, 0, STEPS):
            if step + 1 == at:
                state.progress.step = at
                state.save(run_dir, made, keep=None, protect=())
        average.settle()
        return on.whole()


def continued(made: Recipe, base: Path, run_dir: Path, at: int) -> dict[str, Tensor]:
    with bench(made, base) as on:
        average = average_of(on)
        state = state_of(on, average)
        checkpoint = find_latest(run_dir).latest
        assert checkpoint is not None
        state.load(checkpoint, made)
        assert state.progress.step == at
        for _ in steps(on, average, at, STEPS):
            pass
        average.settle()
        return on.whole()


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        *(pytest.param(name, "fp32", marks=() if name in FAST else pytest.mark.slow) for name in ENGINES),
        ("single", "bf16_master"),
        ("fsdp2", "bf16_kahan"),
    ],
)
def test_a_continued_average_ends_with_the_same_bits(
    workshop: Path, ranks: EngineRanks, tmp_path: Path, strategy: str, precision: str
) -> None:
    made = asked(workshop, strategy, EMA, ADAMW, training={"precision": precision})
    whole = on_ranks(ranks, strategy, saved, made, workshop, tmp_path, 4)
    again = on_ranks(ranks, strategy, continued, made, workshop, tmp_path, 4)
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        assert value.equal(again[name]), name


@pytest.mark.parametrize(
    ("before", "after"), [("zero3", "single"), ("single", "fsdp2"), ("fsdp2", "zero1"), ("tensor", "zero2")]
)
def test_an_average_goes_on_with_another_engine(
    workshop: Path, ranks: EngineRanks, tmp_path: Path, before: str, after: str
) -> None:
    averaging = {"type": "swa", "start": 2}
    whole = on_ranks(ranks, before, saved, asked(workshop, before, averaging), workshop, tmp_path, 4)
    again = on_ranks(ranks, after, continued, asked(workshop, after, averaging), workshop, tmp_path, 4)
    for name, value in whole.items():
        assert float((value - again[name]).norm() / value.norm()) < 1e-5, name


def test_a_checkpoint_that_began_before_the_average_is_refused(workshop: Path, tmp_path: Path) -> None:
    made = asked(workshop, "single", EMA)
    saved(made, workshop, tmp_path, 4, with_average=False)
    with pytest.raises(UserError, match="--resume: checkpoint-4 has no state of averaging"):
        continued(made, workshop, tmp_path, 4)


def test_before_its_start_there_is_none_in_a_checkpoint(workshop: Path, tmp_path: Path) -> None:
    made = asked(workshop, "single", EMA | {"start": 3})
    whole = saved(made, workshop, tmp_path, 2)
    assert not list(tmp_path.glob("checkpoint-2/part-*"))
    again = continued(made, workshop, tmp_path, 2)
    assert all(value.equal(again[name]) for name, value in whole.items())
