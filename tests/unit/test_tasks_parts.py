"""Mixing, balancing and rules of several tasks, by hand."""

from __future__ import annotations

from copy import deepcopy
from io import StringIO
from math import exp
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor

from tunesmith.batch import Batch
from tunesmith.errors import UserError
from tunesmith.recipe import Recipe
from tunesmith.recipe.load import dump_recipe
from tunesmith.recipe.tasks import (
    AnnealedMixing,
    Mixing,
    ProportionalMixing,
    RoundRobinMixing,
    TemperatureMixing,
    TogetherMixing,
)
from tunesmith.tasks.dwa import factors
from tunesmith.tasks.gradnorm import Watch, target_gradient
from tunesmith.tasks.mixing import Schedule, shares
from tunesmith.tasks.objective import TaskTerm, greater_is_better
from tunesmith.tasks.replay import replayed
from tunesmith.tasks.runs import read_runs
from tunesmith.tasks.uncertainty import HalfLogVariance, LogVariances
from tunesmith.terms import RowCrossEntropy

NAMES = ["a", "b", "c"]


def drawn(mixing: Mixing, windows: list[int], steps: int) -> list[str]:
    schedule = Schedule(NAMES, shares(mixing, windows, steps))
    return [schedule.at(step)[0][0] for step in range(steps)]


def test_an_epoch_has_every_window_of_every_task() -> None:
    windows = [7, 2, 4]
    tasks = drawn(ProportionalMixing(type="proportional"), windows, 39)
    for epoch in range(3):
        part = tasks[epoch * 13 : (epoch + 1) * 13]
        assert [part.count(name) for name in NAMES] == windows


@pytest.mark.parametrize(
    ("mixing", "expected"),
    [
        (TemperatureMixing(type="temperature", temperature=2.0), np.sqrt([900.0, 100.0, 25.0])),
        (RoundRobinMixing(type="round_robin"), np.ones(3)),
    ],
)
def test_windows_keep_to_their_shares(mixing: Mixing, expected: Any) -> None:
    tasks = drawn(mixing, [900, 100, 25], 400)
    for end in range(1, 401):
        due = end * expected / expected.sum()
        had = np.array([tasks[:end].count(name) for name in NAMES])
        assert np.abs(had - due).max() < 1.0 + 1e-9


def test_annealing_goes_from_one_distribution_to_the_other() -> None:
    mixing = AnnealedMixing(type="annealed", start=1.0, end=0.0)
    tasks = drawn(mixing, [80, 10, 10], 3000)
    first, last = tasks[:300], tasks[-300:]
    assert 0.7 < first.count("a") / 300 < 0.82
    assert 0.3 < last.count("a") / 300 < 0.4
    power = shares(mixing, [80, 10, 10], 3000)
    assert power is not None
    assert power(0).tolist() == [80.0, 10.0, 10.0]
    assert power(2999).tolist() == [1.0, 1.0, 1.0]


def test_the_schedule_is_a_function_of_the_step() -> None:
    whole, later = (
        Schedule(NAMES, shares(ProportionalMixing(type="proportional"), [3, 5, 2], 1)) for _ in "ab"
    )
    steps = [whole.at(step) for step in range(30)]
    assert later.at(29) == steps[29]
    assert [later.at(step) for step in range(30)] == steps
    for name in NAMES:  # a task's windows come in their order, none left out
        own = [count for ((task, count),) in steps if task == name]
        assert own == list(range(len(own)))


def test_a_stopped_task_is_left_out_from_then_on() -> None:
    schedule = Schedule(NAMES, shares(RoundRobinMixing(type="round_robin"), [1, 1, 1], 1))
    before = [schedule.at(step) for step in range(6)]
    schedule.stop("b", 6)
    assert [schedule.at(step) for step in range(6)] == before
    assert {schedule.at(step)[0][0] for step in range(6, 20)} == {"a", "c"}
    assert not schedule.ended
    together = Schedule(NAMES, shares(TogetherMixing(type="together"), [1, 1, 1], 1))
    together.stop("a", 2)
    assert [len(together.at(step)) for step in range(4)] == [3, 3, 2, 2]


def test_dwa_against_the_formula() -> None:
    last, before, temperature = [1.0, 2.0, 0.5], [2.0, 2.0, 4.0], 2.0
    quotients = [0.5, 1.0, 0.125]
    powers = [exp(q / temperature) for q in quotients]
    assert factors(last, before, temperature) == pytest.approx([3 * p / sum(powers) for p in powers])
    assert sum(factors(last, before, 0.1)) == pytest.approx(3.0)
    assert factors([float("nan"), 1.0], [1.0, 1.0], 1.0) == [1.0, 1.0]


def test_gradnorm_moves_down_the_paper_s_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    norms, weights, losses, first = (
        torch.rand(4, generator=generator, dtype=torch.float64) + 0.5 for _ in range(4)
    )
    own = weights.clone().requires_grad_()
    weighted = own * norms
    rate = losses / first
    target = (weighted.mean() * (rate / rate.mean()) ** 1.5).detach()
    (weighted - target).abs().sum().backward()
    assert own.grad is not None
    assert torch.allclose(target_gradient(norms, weights, losses, first, 1.5), own.grad)


def test_the_watch_sees_the_gradient_of_the_matrix() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    plain = deepcopy(model)
    watch = Watch(cast(torch.nn.Linear, model[2]), ["a", "b"])
    expected: dict[str, Tensor] = {}
    for name in ("a", "b", "a"):
        inputs = torch.randn(2, 5, 4)
        with watch.around(Batch({}, {}, (0,), 1, task=name)):
            loss = model(inputs).square().sum()
        loss.backward()
        weight = cast(torch.nn.Linear, plain[2]).weight
        (own,) = torch.autograd.grad(plain(inputs).square().sum(), [weight])
        expected[name] = expected[name] + own if name in expected else own
    for name, value in expected.items():
        assert torch.allclose(watch.sums[name], value, rtol=1e-5, atol=1e-6)


def test_uncertainty_has_its_minimum_where_the_paper_has() -> None:
    """d/ds (exp(−s) L + s/2) = 0 at s = log 2L."""
    module, losses = LogVariances(2), torch.tensor([0.7, 3.0])
    with torch.no_grad():
        module.log_variances.copy_(torch.log(2 * losses))
    precisions, halves = module()
    (precisions * losses + halves).sum().backward()
    assert module.log_variances.grad is not None
    assert module.log_variances.grad.abs().max() < 1e-6
    assert torch.allclose(precisions, 1 / (2 * losses))


def test_half_a_log_variance_counts_once_for_a_window() -> None:
    """However its rows are split, and none of it where the window has no row of the task."""
    term, halves = HalfLogVariance("a", 0, 1.0), torch.tensor([0.8, 5.0])
    batches = [
        Batch({}, {}, tuple(range(rows)), 1, task=name) for rows, name in ((3, "a"), (5, "a"), (2, "b"))
    ]
    total = torch.tensor(float(sum(term.units(batch) for batch in batches)))
    parts = [term({"tunesmith_log_variances": halves}, batch, total) for batch in batches]
    assert float(sum(parts)) == pytest.approx(0.8)
    assert [float(part) for part in parts][2] == 0.0


def test_a_term_is_silent_for_other_tasks() -> None:
    targets = {"labels": torch.tensor([1, 0]), "row_mask": torch.ones(2)}
    term = TaskTerm("a", RowCrossEntropy(), 0.25, alone=True)
    mine, other = (Batch({}, targets, (0, 1), 2, task=name) for name in ("a", "b"))
    logits = torch.randn(2, 3, requires_grad=True)
    assert (term.name, term.weight) == ("a", 0.25)
    assert (term.units(mine), term.units(other)) == (2, 0)
    assert not term({"logits": logits}, other, torch.ones(())).requires_grad
    assert torch.equal(
        term({"logits": logits}, mine, torch.ones(())),
        RowCrossEntropy()({"logits": logits}, mine, torch.ones(())),
    )


def test_which_metrics_are_to_fall() -> None:
    assert greater_is_better("tags_f1")
    assert not greater_is_better("lm_perplexity")
    assert not greater_is_better("eval_a_loss")
    assert greater_is_better("pieces")


def values(**sections: Any) -> dict[str, Any]:
    def task(**more: Any) -> dict[str, Any]:
        source = {"path": "a.csv", "format": "classification"}
        return {
            "data": {"train": [source], "eval": [source]},
            "objective": {"type": "classification"},
            **more,
        }

    return {
        "model": {"model_name_or_path": "m"},
        "tasks": {"one": task(), "two": task(weight=2.0, head={"pooling": "mean"})},
        "run_name": "r",
        **sections,
    }


def test_a_recipe_of_tasks_is_written_and_read_again() -> None:
    recipe = Recipe.model_validate(values())
    again = YAML(typ="safe").load(StringIO(dump_recipe(recipe)))
    assert "data" not in again
    assert Recipe.model_validate(again) == recipe
    view = recipe.view("two")
    assert view.data.train[0].path == "a.csv"
    assert view.trainable.head is not None
    assert not view.tasks


FEW = {"training": {"global_batch_size": 1, "per_device_train_batch_size": 1}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": {"train": {"path": "a", "format": "text"}}}, "data: and tasks exclude each other"),
        ({"trainable": {"adapters": [{"type": "lora"}]}}, "trainable.adapters: a PEFT folder holds one head"),
        ({"trainable": {"head": {}}}, "trainable.head: is each task's"),
        ({"evaluation": {"metrics": ["accuracy"]}}, "evaluation.metrics: is each task's"),
        ({"multitask": {"balancing": {"type": "gradnorm"}}}, "multitask.balancing.type: gradnorm compares"),
        (
            {"multitask": {"mixing": {"type": "together"}}, **FEW},
            "training.global_batch_size: 1 rows are not",
        ),
        (
            {"multitask": {"mixing": {"type": "together", "rows": {"one": 3, "two": 4}}}},
            "multitask.mixing.rows: 7 rows in all",
        ),
        (
            {"multitask": {"mixing": {"type": "together", "rows": {"one": 3}}}},
            "multitask.mixing.rows: needs a number for each task",
        ),
        (
            {"multitask": {"mixing": {"type": "together", "epoch": "three"}}},
            "multitask.mixing.epoch: is no task that is trained",
        ),
        ({"remember": {"run": "runs/x", "replay": {}}}, "remember.replay: and tasks exclude each other"),
    ],
)
def test_what_does_not_go_with_tasks_is_told(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("(", r"\(")):
        Recipe.model_validate(values(**change))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weight": 0.0}, None),
        ({"objective": {"type": "sft"}}, "tasks.one.data.train.0.format: objective sft does not read"),
        ({"objective": {"type": "masked_lm"}, "head": {}}, "tasks.one.data.train.0.format"),
        ({"data": None}, "is missing"),
        ({"run": "runs/x", "head": {}}, "head: is that of run"),
    ],
)
def test_a_task_keeps_the_rules_of_a_run(change: dict[str, Any], told: str | None) -> None:
    given = values()
    given["tasks"]["one"] |= change
    if told is None:
        Recipe.model_validate(given)
        return
    with pytest.raises(ValueError, match=told):
        Recipe.model_validate(given)


def test_without_tasks_there_is_nothing_to_share() -> None:
    given = {key: value for key, value in values().items() if key != "tasks"}
    given |= values()["tasks"]["one"]
    Recipe.model_validate(given)
    with pytest.raises(ValueError, match="multitask: has no effect without tasks"):
        Recipe.model_validate(given | {"multitask": {"mixing": {"type": "round_robin"}}})


@pytest.mark.parametrize(
    ("ratio", "told"), [(0.01, "no old row among 32 .*: set it to 0.031 or more"), (0.99, "0.97 or less")]
)
def test_a_ratio_leaves_rows_of_both(ratio: float, told: str) -> None:
    task = values()["tasks"]["one"]
    with pytest.raises(ValueError, match=told):
        Recipe.model_validate(
            {
                "model": {"model_name_or_path": "runs/x/final"},
                **{name: task[name] for name in ("data", "objective")},
                "remember": {"run": "runs/x", "replay": {"ratio": ratio}},
                "training": {"global_batch_size": 32, "per_device_train_batch_size": 32},
                "run_name": "ratio",
            }
        )


def test_replay_says_what_two_tasks_do_not_have() -> None:
    task = values()["tasks"]["one"]
    recipe = Recipe.model_validate(
        {
            "model": {"model_name_or_path": "runs/x/final"},
            **{name: task[name] for name in ("data", "objective")},
            "remember": {"run": "runs/x", "replay": {}},
            "trainable": {"adapters": [{"type": "lora"}]},
            "run_name": "replay",
        }
    )
    with pytest.raises(
        UserError, match=r"remember.replay: makes the run one of two tasks.*trainable.adapters"
    ):
        replayed(recipe)


def test_a_run_to_be_replayed_that_is_none_is_told_by_its_setting(tmp_path: Path) -> None:
    task = values()["tasks"]["one"]
    recipe = Recipe.model_validate(
        {
            "model": {"model_name_or_path": "gone/final"},
            **{name: task[name] for name in ("data", "objective")},
            "remember": {"run": "gone", "replay": {}},
            "run_name": "replay",
        }
    )
    with pytest.raises(UserError, match=r"^remember\.run: .*gone is not the folder of a finished run"):
        read_runs(recipe, tmp_path)
