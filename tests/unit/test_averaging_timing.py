"""Averages of weights: when they fall, what they weigh, what is refused; against fp64 by hand."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from tunesmith.averaging import Average, build_average, state_bytes
from tunesmith.averaging.timing import Timing, initial_share
from tunesmith.engine.shards import Shard
from tunesmith.errors import UserError
from tunesmith.recipe.averaging import EMA, SWA, Averaging

SETTINGS: TypeAdapter[Any] = TypeAdapter(Averaging)


class Held:
    """Two parameters of an engine that shards nothing; the second is rounded."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.values = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16()}
        self.writes = 0

    def shards(self) -> list[Shard]:
        return [Shard(name, value, None, tuple(value.shape), 0) for name, value in self.values.items()]

    def wrote(self) -> None:
        self.writes += 1


def train(
    settings: EMA | SWA, steps: int, per_epoch: int = 4, skipped: Sequence[int] = ()
) -> tuple[Average, Held, list[dict[str, Tensor]]]:
    """The average, what it averaged, and the weights after every number of steps."""
    torch.manual_seed(0)
    held: Any = Held()
    average = Average(settings, Timing.of(settings, steps, per_epoch))
    stream: Any = SimpleNamespace(steps_per_epoch=per_epoch)
    average.begin(held, stream)
    history = [{name: value.clone() for name, value in held.values.items()}]
    for step in range(steps):
        if step not in skipped:
            for value in held.values.values():
                value.add_(torch.randn(value.shape).to(value.dtype))
        average.after_step(step, torch.tensor(float(step in skipped)))
        history.append({name: value.clone() for name, value in held.values.items()})
    return average, held, history


def averaged(average: Average) -> dict[str, Tensor]:
    return {name: tensors["average"] for name, tensors in average.sharded_state().items()}


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize(("every", "start"), [(1, None), (3, None), (1, 5), (4, 0.3), (2, "1.5 epochs")])
def test_an_exponential_average_by_hand(warmup: bool, every: int, start: Any) -> None:
    """fp64: a ← d a + (1 − d) θ, from the weights at the start on."""
    settings = EMA(decay=0.8, warmup=warmup, update_every=every, start=start)
    average, _, history = train(settings, 20)
    begins = {None: 0, 5: 5, 0.3: 6, "1.5 epochs": 6}[start]
    for name, found in averaged(average).items():
        expected = history[begins][name].double()
        for number, done in enumerate(range(begins + every, 21, every)):
            decay = min(0.8, (1 + number) / (10 + number)) if warmup else 0.8
            expected = decay * expected + (1 - decay) * history[done][name].double()
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("start", "every", "taken"),
    [(0.75, 1, range(15, 21)), (3, 4, (3, 7, 11, 15, 19)), ("1 epoch", "epoch", (4, 8, 12, 16, 20)),
     (0.5, "epoch", (12, 16, 20))],
)  # fmt: skip
def test_a_mean_by_hand(start: Any, every: Any, taken: Sequence[int]) -> None:
    average, _, history = train(SETTINGS.validate_python({"type": "swa", "start": start, "every": every}), 20)
    for name, found in averaged(average).items():
        expected = torch.stack([history[done][name].double() for done in taken]).mean(0)
        assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_mean_is_torch_s() -> None:
    average, _, history = train(SWA(type="swa", start=3), 12)
    holder = nn.ParameterDict({"a": nn.Parameter(history[3]["a"].clone())})
    swa = torch.optim.swa_utils.AveragedModel(holder)
    for done in range(3, 13):
        holder["a"].data.copy_(history[done]["a"])
        swa.update_parameters(holder)
    expected: Any = swa.module
    assert torch.allclose(averaged(average)["a"], expected["a"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [EMA(decay=0.7, warmup=False), SWA(type="swa", start=1)])
def test_a_suppressed_step_is_not_averaged(settings: EMA | SWA) -> None:
    average, _, history = train(settings, 6, skipped=(2, 4))
    kept = [history[done] for done in (1, 2, 4, 6)]
    for name, found in averaged(average).items():
        if isinstance(settings, SWA):
            expected = torch.stack([weights[name].double() for weights in kept]).mean(0)
        else:
            expected = history[0][name].double()
            for weights in kept:
                expected = 0.7 * expected + 0.3 * weights[name].double()
        assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_mean_begins_with_weights_also_where_their_step_was_suppressed() -> None:
    average, _, history = train(SWA(type="swa", start=3), 6, skipped=(2, 3, 4, 5))
    for name, found in averaged(average).items():
        assert found.equal(history[2][name].float())


def test_swapped_weights_come_back_bitwise() -> None:
    average, held, _ = train(EMA(decay=0.5), 4)
    before = {name: value.clone() for name, value in held.values.items()}
    kept = {name: value.clone() for name, value in averaged(average).items()}
    with average.swapped():
        assert held.writes == 1
        for name, value in held.values.items():
            assert value.equal(kept[name].to(value.dtype)), name
            assert not value.equal(before[name])
        with pytest.raises(AssertionError, match="where the average is looked for"):
            average.sharded_state()
    assert held.writes == 2
    for name, value in held.values.items():
        assert value.equal(before[name])
        assert averaged(average)[name].equal(kept[name])
    average.settle()
    assert all(value.equal(kept[name].to(value.dtype)) for name, value in held.values.items())


def test_before_it_begins_there_is_no_average() -> None:
    average, held, _ = train(EMA(start=9), 6)
    before = {name: value.clone() for name, value in held.values.items()}
    with average.swapped():
        assert all(value.equal(before[name]) for name, value in held.values.items())
    assert average.sharded_state() == {}
    assert held.writes == 0


@pytest.mark.parametrize("settings", [EMA(decay=0.7, start=2), SWA(type="swa", start=3, every=2)])
def test_state_goes_on_bitwise(settings: EMA | SWA) -> None:
    for stop in (1, 4):
        whole, held, _ = train(settings, 9)
        target: Any = Held()
        first, other, _ = train(settings, stop)  # the generator stands where the whole run's stood
        timing = Timing.of(settings, 9, 4)
        again = Average(settings, timing)
        stream: Any = SimpleNamespace(steps_per_epoch=4)
        again.begin(target, stream)
        again.load_sharded_state(first.sharded_state())
        again.load_state(first.state())
        target.values = other.values
        for step in range(stop, 9):
            for value in target.values.values():
                value.add_(torch.randn(value.shape).to(value.dtype))
            again.after_step(step, torch.tensor(0.0))
        assert all(held.values[name].equal(target.values[name]) for name in held.values)
        for name, value in averaged(whole).items():
            assert value.equal(averaged(again)[name]), (stop, name)


def test_the_constant_rate_holds_from_the_start() -> None:
    average, _, _ = train(SWA(type="swa", start=0.5, learning_rate=0.01), 8)
    assert [average.learning_rate(step) for step in (3, 4, 7)] == [None, 0.01, 0.01]
    average, _, _ = train(EMA(), 3)
    assert average.learning_rate(2) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            SWA(type="swa", start=0.9, every="epoch"),
            "begins after step 9 of 10 and takes the weights every 10 steps: 1",
        ),
        (EMA(start=10), "lower averaging.start or averaging.update_every"),
        (EMA(update_every=11), "every 11 steps: 1 of them are no average"),
        (SWA(type="swa", start="3 epochs"), "begins after step 30 of 10"),
    ],
)
def test_a_run_too_short_for_an_average_is_refused(settings: EMA | SWA, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_average(settings, nn.Linear(2, 2), 10, 10)


def test_statistics_of_the_current_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(UserError, match=r"1 is a BatchNorm1d.*trainable.freeze: \['1\.\*'\]"):
        build_average(EMA(), model, 10, 10)
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    build_average(EMA(), model, 10, 10)
    build_average(EMA(), nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), 10, 10)


def test_an_average_that_is_mostly_its_beginning_is_told() -> None:
    found = build_average(EMA(decay=0.999, warmup=False), nn.Linear(2, 2), 100, 10)
    assert found.facts["averaging"]["initial_share"] == pytest.approx(0.999**100)
    assert "90% of the last average" in found.notes[0]
    assert "of averaging.decay: 0.955, it would be 1%" in found.notes[0]
    assert build_average(EMA(decay=0.955, warmup=False), nn.Linear(2, 2), 100, 10).notes == ()
    assert build_average(EMA(decay=0.999), nn.Linear(2, 2), 100, 10).notes == ()
    assert initial_share(EMA(decay=0.999), 3) == pytest.approx(0.1 * 2 / 11 * 3 / 12)


def test_it_is_counted() -> None:
    assert state_bytes(10) == 40
