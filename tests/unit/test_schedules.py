"""The learning rate's shapes against transformers' and torch's schedulers, their ends, and plateau's
state."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.optim import lr_scheduler

from tunesmith.errors import UserError
from tunesmith.recipe import schedule as recipe
from tunesmith.schedules import Plateau, multiplier, warmup_steps

TOTAL = 97
ADAPTER: TypeAdapter[recipe.Schedule] = TypeAdapter(recipe.Schedule)
TYPES = [
    "constant",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "exponential",
    "step",
    "cyclic",
    "one_cycle",
    "wsd",
    "reduce_on_plateau",
]
REQUIRED = {"step": {"step_size": 7}, "cyclic": {"cycle_steps": 10}}


def schedule(kind: str, **fields: Any) -> recipe.Schedule:
    return ADAPTER.validate_python({"lr_scheduler_type": kind, **REQUIRED.get(kind, {}), **fields})


def curve(settings: recipe.Schedule, total: int = TOTAL) -> list[float]:
    return [multiplier(settings, step, total) for step in range(total)]


def an_optimizer(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)


def torch_curve(scheduler: Any, total: int = TOTAL) -> list[float]:
    rates: list[float] = []
    for step in range(total):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        if step < total - 1:
            scheduler.step()
    return rates


def lambda_of(scheduler: Any) -> Callable[[int], float]:
    return scheduler.lr_lambdas[0]


def test_every_type_is_tested() -> None:
    tags = {
        model["properties"]["lr_scheduler_type"]["const"] for model in ADAPTER.json_schema()["$defs"].values()
    }
    assert tags == set(TYPES)


# --- against transformers and torch
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_decays_are_transformers(warmup: int) -> None:
    from transformers import optimization as theirs

    optimizer = an_optimizer(0.5)
    pairs = [
        (schedule("linear"), theirs.get_linear_schedule_with_warmup(optimizer, warmup, TOTAL)),
        (schedule("cosine"), theirs.get_cosine_schedule_with_warmup(optimizer, warmup, TOTAL)),
        (
            schedule("cosine", min_lr_ratio=0.2),
            theirs.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, TOTAL, min_lr_rate=0.2),
        ),
        (
            schedule("cosine_with_restarts", num_cycles=4),
            theirs.get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, warmup, TOTAL, 4),
        ),
        (
            schedule("polynomial", power=2.5, min_lr_ratio=0.1),
            theirs.get_polynomial_decay_schedule_with_warmup(
                optimizer, warmup, TOTAL, lr_end=0.05, power=2.5
            ),
        ),
        (schedule("constant"), theirs.get_constant_schedule_with_warmup(optimizer, warmup)),
    ]
    for kind, name in (("linear", "linear"), ("cosine", "cosine"), ("sqrt", "1-sqrt")):
        pairs.append(
            (
                schedule("wsd", decay_ratio=0.25, decay_type=kind, min_lr_ratio=0.1),
                theirs.get_wsd_schedule(
                    optimizer,
                    num_warmup_steps=warmup,
                    num_decay_steps=25,
                    num_training_steps=TOTAL,
                    decay_type=name,
                    min_lr_ratio=0.1,
                ),
            )
        )
    for settings, scheduler in pairs:
        settings = settings.model_copy(update={"warmup_steps": warmup})
        factor = lambda_of(scheduler)
        for step in range(warmup, TOTAL + 1):
            assert multiplier(settings, step, TOTAL) == pytest.approx(factor(step), abs=1e-12), (
                settings,
                step,
            )


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        (schedule("exponential", gamma=0.97), lambda o: lr_scheduler.ExponentialLR(o, 0.97)),
        (schedule("step", gamma=0.3), lambda o: lr_scheduler.StepLR(o, 7, 0.3)),
        (
            schedule("cyclic", cycle_steps=10, min_lr_ratio=0.2),
            lambda o: lr_scheduler.CyclicLR(o, 0.2, 1.0, step_size_up=5),
        ),
        (
            schedule("one_cycle", pct_start=0.37, div_factor=8.0, final_div_factor=50.0),
            lambda o: lr_scheduler.OneCycleLR(
                o, 1.0, total_steps=TOTAL, pct_start=0.37, div_factor=8.0, final_div_factor=50.0
            ),
        ),
        (schedule("linear"), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, TOTAL)),
        (
            schedule("cosine", min_lr_ratio=0.3),
            lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, 0.3),
        ),
    ],
    ids=lambda value: getattr(value, "lr_scheduler_type", ""),
)
def test_shapes_are_torchs(settings: recipe.Schedule, theirs: Callable[[Any], Any]) -> None:
    assert curve(settings) == pytest.approx(torch_curve(theirs(an_optimizer())), rel=1e-9, abs=1e-12)


# --- warm-up
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "one_cycle"])
@pytest.mark.parametrize("warmup", [1, 9])
def test_warmup_is_a_line_without_a_zero_to_the_first_value(kind: str, warmup: int) -> None:
    settings = schedule(kind, warmup_steps=warmup)
    first = multiplier(settings, warmup, TOTAL)
    assert first == multiplier(schedule(kind), 0, TOTAL - warmup)
    assert first == (0.1 if kind == "cyclic" else 1.0)
    for step in range(warmup):
        assert multiplier(settings, step, TOTAL) == pytest.approx(first * (step + 1) / (warmup + 1))


def test_warmup_delays_what_follows() -> None:
    for kind in ("exponential", "step", "cyclic"):
        assert multiplier(schedule(kind, warmup_steps=5), 5 + 23, None) == multiplier(
            schedule(kind), 23, None
        )


@pytest.mark.parametrize(
    ("ratio", "total", "expected"),
    [
        (0.1, 100, 10),
        (0.1, 101, 11),
        (0.07, 100, 7),
        (0.29, 100, 29),
        (1e-05, 100, 1),
        (0.0, 9, 0),
        (1.0, 9, 9),
    ],
)
def test_the_ratio_is_a_decimal_rounded_up(ratio: float, total: int, expected: int) -> None:
    """0.07 × 100 and 0.29 × 100 are 7.000000000000001 and 28.999999999999996 in binary."""
    assert warmup_steps(schedule("linear", warmup_ratio=ratio), total) == expected


def test_warmup_steps_as_given_or_none() -> None:
    assert warmup_steps(schedule("linear", warmup_steps=4), 50) == 4
    assert warmup_steps(schedule("linear", warmup_steps=4), None) == 4
    assert warmup_steps(schedule("linear"), 50) == 0
    assert warmup_steps(schedule("one_cycle"), 50) == 0


def test_a_warmup_of_all_steps() -> None:
    settings = schedule("linear", warmup_ratio=1.0)
    assert curve(settings, 4) == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_what_does_not_fit_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"schedule\.warmup_ratio: the number of steps is not known"):
        multiplier(schedule("constant", warmup_ratio=0.1), 0, None)
    with pytest.raises(UserError, match="ends after 5 steps, inside a warm-up of 6"):
        multiplier(schedule("linear", warmup_steps=6), 0, 5)
    with pytest.raises(UserError, match="warm-up of 60 steps and a decay of 50 do not fit into 100"):
        multiplier(schedule("wsd", warmup_steps=60, decay_ratio=0.5), 60, 100)
    for kind in ("linear", "cosine", "cosine_with_restarts", "polynomial", "one_cycle", "wsd"):
        with pytest.raises(UserError, match=f"{kind} needs the number of steps"):
            multiplier(schedule(kind), 0, None)


def test_schedules_without_an_end_need_no_total() -> None:
    for kind in ("constant", "exponential", "step", "cyclic", "reduce_on_plateau"):
        settings = schedule(kind, warmup_steps=3)
        assert [multiplier(settings, s, None) for s in range(40)] == [
            multiplier(settings, s, 40) for s in range(40)
        ]


def test_one_cycle_has_no_warmup_fields() -> None:
    for field in ({"warmup_steps": 3}, {"warmup_ratio": 0.1}):
        with pytest.raises(ValidationError, match="warmup"):
            schedule("one_cycle", **field)


# --- ends and monotony
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "cosine", "cosine_with_restarts", "polynomial", "wsd"])
@pytest.mark.parametrize("low", [0.0, 0.1, 0.37])
def test_from_1_to_min_lr_ratio_and_no_further(kind: str, low: float) -> None:
    settings = schedule(kind, min_lr_ratio=low, warmup_steps=11)
    assert multiplier(settings, 11, TOTAL) == 1.0
    assert low < multiplier(settings, TOTAL - 1, TOTAL) < low + 0.3
    assert multiplier(settings, TOTAL, TOTAL) == low
    assert multiplier(settings, TOTAL + 50, TOTAL) == low
    assert all(low < value <= 1.0 for value in curve(settings)[11:])


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "exponential", "step", "wsd"])
def test_up_then_down(kind: str) -> None:
    values = curve(schedule(kind, warmup_steps=10))
    assert all(a < b for a, b in pairwise(values[:11]))
    assert all(a >= b for a, b in pairwise(values[10:]))
    assert values[-1] < 1.0


def test_restarts_fall_on_their_steps() -> None:
    """In floats 49 × (1 / 49) is below 1: the restart would come out as the end of the cycle before, 0."""
    for cycles in (7, 49):
        values = curve(schedule("cosine_with_restarts", num_cycles=cycles), cycles * 3)
        assert [step for step, value in enumerate(values) if value == 1.0] == list(range(0, cycles * 3, 3))


def test_one_cycle_ends() -> None:
    settings = schedule("one_cycle", pct_start=0.25, div_factor=10.0, final_div_factor=100.0)
    values = curve(settings, 100)
    assert values[0] == pytest.approx(0.1)
    assert values[24] == 1.0
    assert max(values) == 1.0
    assert values[99] == pytest.approx(1e-3)
    assert all(a < b for a, b in pairwise(values[:25]))
    assert all(a > b for a, b in pairwise(values[24:]))


def test_wsd_is_stable_between_warmup_and_decay() -> None:
    values = curve(schedule("wsd", warmup_steps=10, decay_ratio=0.2), 100)
    assert values[10:81] == [1.0] * 71
    assert values[81] == pytest.approx(0.95)
    assert values[99] == pytest.approx(0.05)
    undecayed = schedule("wsd", decay_ratio=0.0)
    assert [multiplier(undecayed, step, 5) for step in range(7)] == [1.0] * 7


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_runs(kind: str, total: int) -> None:
    values = curve(schedule(kind), total)
    assert all(0.0 < value <= 1.0 and math.isfinite(value) for value in values)


@pytest.mark.parametrize("kind", TYPES)
def test_any_step_can_be_asked_first(kind: str) -> None:
    """Resume: the value at a step does not depend on the steps asked before."""
    settings = schedule(kind)
    forward = curve(settings)
    backward = [multiplier(schedule(kind), step, TOTAL) for step in reversed(range(TOTAL))]
    assert backward[::-1] == forward


# --- reduce on plateau
# ----------------------------------------------------------------------------------------------


def plateau(**fields: Any) -> Plateau:
    settings = schedule("reduce_on_plateau", **fields)
    assert isinstance(settings, recipe.ReduceOnPlateau)
    return Plateau(settings)


@pytest.mark.parametrize("greater", [False, True])
@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_is_torchs(greater: bool, patience: int) -> None:
    generator = torch.Generator().manual_seed(5)
    ours = plateau(factor=0.6, patience=patience, threshold=0.02, min_lr_ratio=0.05)
    optimizer = an_optimizer()
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer, "max" if greater else "min", factor=0.6, patience=patience, threshold=0.02, min_lr=0.05
    )
    factors: list[float] = []
    for value in (torch.rand(60, generator=generator) + 0.5).tolist():
        ours.observe(value, greater)
        theirs.step(value)
        factors.append(ours.factor)
        assert ours.factor == pytest.approx(optimizer.param_groups[0]["lr"])
    assert len(set(factors)) > 3
    assert factors[-1] == (0.05 if patience < 3 else factors[-1])


def test_plateau_counts_and_cuts() -> None:
    state = plateau(factor=0.5, patience=1, threshold=0.1)
    seen: list[tuple[float | None, int, float]] = []
    for value in (1.0, 0.95, 0.8, 0.79, 0.78, 0.78):
        state.observe(value, greater_is_better=False)
        seen.append((state.best, state.bad, state.factor))
    assert seen == [(1.0, 0, 1.0), (1.0, 1, 1.0), (0.8, 0, 1.0), (0.8, 1, 1.0), (0.8, 0, 0.5), (0.8, 1, 0.5)]


def test_plateau_with_negative_metrics_and_non_finite_values() -> None:
    state = plateau(patience=9, threshold=0.1)
    state.observe(math.inf, greater_is_better=False)
    state.observe(math.nan, greater_is_better=False)
    assert (state.best, state.bad) == (None, 2)
    state.observe(-1.0, greater_is_better=False)
    state.observe(-1.05, greater_is_better=False)
    assert (state.best, state.bad) == (-1.0, 1)
    state.observe(-1.2, greater_is_better=False)
    assert (state.best, state.bad) == (-1.2, 0)


def test_plateau_resumes_where_it_stopped() -> None:
    values = [1.0, 1.1, 1.2, 0.9, 1.0, 1.0, 1.0, 0.5, 0.6, 0.7]
    whole, first, second = plateau(patience=1), plateau(patience=1), plateau(patience=1)
    for value in values:
        whole.observe(value, greater_is_better=False)
    for value in values[:5]:
        first.observe(value, greater_is_better=False)
    second.load_state_dict(first.state_dict())
    for value in values[5:]:
        second.observe(value, greater_is_better=False)
    assert second == whole
    assert whole.factor < 1.0


def test_plateaus_floor_never_raises_the_rate() -> None:
    state = plateau(patience=0, min_lr_ratio=0.5)
    state.load_state_dict({"best": 1.0, "bad": 0, "factor": 0.25})
    state.observe(2.0, greater_is_better=False)
    assert state.factor == 0.25
