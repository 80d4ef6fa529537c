"""Averages of the weights on every engine: by hand, swapped in and back, saved and continued, through whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine_ranks import Bench, EngineRanks, bench
from objective_cases import ADAMW, CASES, OFFLOADED, SGD, SHARDED, SPLIT, TWO, apart, recipe
from rank_pool import Pools
from test_strategies_resume import interrupted
from tunesmith.averaging import Average, build_average
from tunesmith.checkpoint.pieces import Saved
from tunesmith.checkpoint.run_state import RunState
from tunesmith.checkpoint.state import Progress
from tunesmith.checkpoint.store import find_latest
from tunesmith.commands.evaluate import evaluate_run
from tunesmith.commands.finished import open_run
from tunesmith.errors import UserError
from tunesmith.loss_scale import LossScale
from tunesmith.recipe import Recipe
from tunesmith.recipe.load import load_recipe
from tunesmith.run import Resume, run
from tunesmith.tracking import metrics_file

ENGINES: dict[str, dict[str, Any]] = {
    "single": {"strategy": "single"},
    "ddp": {"strategy": "ddp"},
    **SHARDED,
    **OFFLOADED,
    "tensor": SPLIT,
}
DECAY, START = 0.7, 2
EMA: dict[str, Any] = {"type": "ema", "decay": DECAY, "warmup": False, "start": START}
SWA: dict[str, Any] = {"type": "swa", "start": 3}
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


def whole_run(
    workshop: Path, pools: Pools, strategy: str, name: str, averaging: dict[str, Any] | None, **sections: Any
) -> Path:
    """Evaluates and saves after every second step."""
    data = str(workshop / "data" / f"{CASES['sft'].file}.jsonl")
    made = recipe(
        workshop, CASES["sft"], ADAMW, TWO, 8,
        data={"eval": [{"path": data, "format": CASES["sft"].format}]},
        evaluation={"eval_steps": 2} | sections.pop("evaluation", {}), parallel=ENGINES[strategy], averaging=averaging,
        checkpoint={"save_steps": 1, "save_total_limit": None, "final": "last"} | sections.pop("checkpoint", {}),
        **sections,
    ).model_copy(update={"run_name": name})  # fmt: skip
    start(pools, made, workshop, strategy)
    return workshop / "runs" / name


def start(pools: Pools, made: Recipe, base: Path, strategy: str, how: Resume | None = None) -> None:
    if strategy == "single":
        run(made, base, how or Resume())
    else:
        pools[2].run(made, base, how)


def final(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "final" / "model.safetensors")


def evaluations(run_dir: Path) -> list[float]:
    return [row["eval_loss"] for row in metrics_file.read(run_dir / "metrics.jsonl") if "eval_loss" in row]


def averaged_by_hand(workshop: Path, run_dir: Path, start: int, end: int) -> dict[str, Tensor]:
    """From the model's file, for the weights after step 0, and those in the checkpoints."""
    before = load_file(workshop / "models" / CASES["sft"].model / "model.safetensors")
    found: dict[str, Tensor] = {}
    for step in range(start, end + 1):
        state = Saved(run_dir / f"checkpoint-{step}", "weights") if step else None
        for name in before:
            weights = (before[name] if state is None else state.whole(name)).double()
            found[name] = DECAY * found[name] + (1 - DECAY) * weights if name in found else weights
    return found


@pytest.mark.parametrize("strategy", some_slow(["single", "ddp", "zero3", "fsdp2"]))
def test_a_run_evaluates_and_exports_the_average(workshop: Path, pools: Pools, strategy: str) -> None:
    plain = whole_run(workshop, pools, strategy, f"plain-{strategy}", None)
    found = whole_run(workshop, pools, strategy, f"ema-{strategy}", EMA)
    for row, expected in zip(rows(found), rows(plain), strict=True):
        assert (row["loss"], row["grad_norm"]) == (
            expected["loss"],
            expected["grad_norm"],
        )  # it alters no training
    assert all(a != b for a, b in zip(evaluations(found)[1:], evaluations(plain)[1:], strict=True))
    expected = averaged_by_hand(workshop, found, START, 8)
    for name, value in final(found).items():
        assert float((value - expected[name]).norm() / expected[name].norm()) < 1e-6, name
    assert not final(found)["lm_head.weight"].equal(final(plain)["lm_head.weight"])
    current = whole_run(workshop, pools, strategy, f"current-{strategy}", EMA | {"evaluate": "current"})
    assert evaluations(current) == evaluations(plain)
    # a checkpoint is opened with the weights that the run's own evaluation of its step saw
    for run_dir in (found, current, plain):
        opened = evaluate_run(open_run(run_dir, 4))
        assert opened.found.loss == pytest.approx(opened.in_the_run["loss"], rel=1e-6)
        assert opened.in_the_run["loss"] == evaluations(run_dir)[1]
    assert all(value.equal(final(current)[name]) for name, value in final(found).items())


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in metrics_file.read(run_dir / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("strategy", some_slow(["single", "ddp", "zero2", "fsdp2"]))
def test_the_best_average_is_exported(workshop: Path, pools: Pools, strategy: str) -> None:
    """The worst step is made the best, so that it is not the last; and a resumed run ends with the same bits."""
    asked = {"evaluation": {"eval_steps": 2, "metric_for_best": "loss", "greater_is_better": True}}
    asked |= {"checkpoint": {"final": "best"}}
    found = whole_run(workshop, pools, strategy, f"best-{strategy}", EMA | {"start": None}, **asked)
    losses = evaluations(found)
    best = 2 * (1 + losses.index(max(losses)))
    assert best < 8
    expected = averaged_by_hand(workshop, found, 0, best)
    for name, value in final(found).items():
        assert float((value - expected[name]).norm() / expected[name].norm()) < 1e-6, name
    again = workshop / "runs" / f"again-{strategy}"
    interrupted(found, again, 5)
    made = load_recipe(found / "recipe.yaml").recipe.model_copy(update={"run_name": again.name})
    start(pools, made, workshop, strategy, Resume(resume=True))
    assert all(value.equal(final(again)[name]) for name, value in final(found).items())
    last = "checkpoint-8"
    for name in Saved(found / last, "part-averaging").names():
        one, other = (
            Saved(run_dir / last, "part-averaging").whole(name, "average") for run_dir in (found, again)
        )
        assert one.equal(other), name


def test_a_mean_trains_at_its_own_rate(workshop: Path, pools: Pools) -> None:
    averaging = {"type": "swa", "start": 0.5, "learning_rate": 5e-4}
    found = rows(whole_run(workshop, pools, "single", "swa-rate", averaging))
    assert [row["learning_rate"] for row in found[4:]] == [5e-4] * 4
    assert all(row["learning_rate"] != 5e-4 for row in found[:4])
