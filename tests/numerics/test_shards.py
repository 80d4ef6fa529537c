"""What a rank holds of the parameters: the same whole on every engine, written, dropped and saved alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_ranks import Bench, EngineRanks, bench
from objective_cases import ADAMW, ALONE, CASES, OFFLOADED, SGD, SHARDED, SHARED, SPLIT, TWO, apart, recipe
from tunesmith.checkpoint.pieces import Saved, file_prefix, save_pieces
from tunesmith.engine.shards import read_shard_state, shard_state
from tunesmith.recipe import Recipe

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    **SHARDED,
    **OFFLOADED,
    "tensor": SPLIT,
    "sequence": SHARED,
    "copies": {"strategy": "fsdp2", "shard_size": 1},
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[EngineRanks]:
    made = EngineRanks.start(2)
    yield made
    made.stop()


def asked(workshop: Path, strategy: str, optimizer: dict[str, Any] = SGD, **sections: Any) -> Recipe:
    parallel = {"strategy": "single"} if strategy == "single" else ENGINES[strategy]
    layout = ALONE if strategy == "single" else TWO
    return recipe(workshop, CASES["sft"], optimizer, layout, 4, parallel=parallel, **sections)


def global_sums(on: Bench) -> tuple[float, float, int]:
    """Σ value², Σ gradient², elements."""
    total = torch.zeros(3, dtype=torch.float64, device=on.engine.device)
    for shard in on.engine.shards():
        assert shard.gradient is not None, shard.name
        assert shard.gradient.shape == shard.value.shape, shard.name
        found = [
            shard.value.double().square().sum(),
            shard.gradient.double().square().sum(),
            shard.value.numel(),
        ]
        total += torch.tensor([float(value) / shard.copies for value in found], dtype=torch.float64)
    sums = on.engine.sum(total) * (on.engine.world_size // on.engine.mean_size)
    return float(sums[0]), float(sums[1]), round(float(sums[2]))


def move(on: Bench) -> None:
    """Writes into every element what depends on its name and its place."""
    for shard in on.engine.shards():
        wave = torch.sin(shard.positions() + len(shard.name))
        shard.value.add_(wave.to(shard.value.dtype), alpha=0.1)
    on.engine.wrote()


def measure(made: Recipe, base: Path) -> dict[str, Any]:
    """All that is compared, from one engine: before any step, in a window, after writing, after a step."""
    with bench(made, base) as on:
        found: dict[str, Any] = {"names": [shard.name for shard in on.engine.shards()]}
        assert all(shard.gradient is None for shard in on.engine.shards())
        found["loss"] = on.gradients(0)
        found["sums"] = global_sums(on)
        found["norm"] = float(on.engine.gradient_square_sum())
        for shard in on.engine.shards():
            assert shard.gradient is not None
            shard.gradient.mul_(torch.cos(shard.positions().float()))
        found["norm_written"] = float(on.engine.gradient_square_sum())
        on.update(0)
        assert all(shard.gradient is None for shard in on.engine.shards())
        found["stepped"] = on.loss(1)
        move(on)
        found["moved"] = on.loss(1)
        found["trained"] = on.gradients(1)
        on.update(1)
        found["weights"] = on.whole()
        return found


@pytest.fixture(scope="module")
def alone(workshop: Path) -> dict[str, Any]:
    return measure(asked(workshop, "single"), workshop)


@pytest.mark.parametrize("strategy", ENGINES)
def test_the_shards_are_the_whole(
    workshop: Path, ranks: EngineRanks, alone: dict[str, Any], strategy: str
) -> None:
    """Values and gradients add up to those of one process; written ones are what the next forward and step use."""
    found = ranks.call(measure, asked(workshop, strategy), workshop)
    assert found[0]["sums"][2] == alone["sums"][2]
    for one in found:
        assert set(one["names"]) <= set(alone["names"])
        assert one["names"] == sorted(one["names"], key=alone["names"].index)
        for key in ("loss", "norm", "norm_written", "stepped", "moved", "trained"):
            assert apart(one[key], alone[key]) < 1e-5, key
        assert apart(one["sums"][0], alone["sums"][0]) < 1e-5
        assert apart(one["sums"][1], alone["sums"][1]) < 1e-5
        assert apart(one["sums"][1], one["norm"]) < 1e-6
    assert {name for one in found for name in one["names"]} == set(alone["names"])
    assert apart(found[0]["norm_written"], found[0]["norm"]) > 0.1
    assert apart(found[0]["moved"], found[0]["stepped"]) > 0.01
    weights: dict[str, Tensor] = found[0]["weights"]
    for name, expected in alone["weights"].items():
        assert float((weights[name] - expected).norm() / expected.norm()) < 1e-5, name


def discarded(made: Recipe, base: Path, drop: bool) -> dict[str, Tensor]:
    with bench(made, base) as on:
        for step in range(2):
            if drop:
                on.gradients(step + 2)
                on.engine.discard()
                assert all(shard.gradient is None for shard in on.engine.shards())
            on.gradients(step)
            on.update(step)
        return on.whole()


@pytest.mark.parametrize("strategy", ["single", *ENGINES])
def test_a_dropped_window_leaves_no_trace(workshop: Path, ranks: EngineRanks, strategy: str) -> None:
    """Bitwise, with AdamW, whose moments and counters would show it."""
    made = asked(workshop, strategy, ADAMW)
    plain, dropped = (
        discarded(made, workshop, drop)
        if strategy == "single"
        else ranks.call(discarded, made, workshop, drop)[0]
        for drop in (False, True)
    )
    assert plain.keys() == dropped.keys()
    for name, value in plain.items():
        assert value.equal(dropped[name]), name


def store(made: Recipe, base: Path, folder: Path) -> None:
    with bench(made, base) as on:
        shards = on.engine.shards()
        state = {s.name: {"place": s.positions().double(), "half": s.positions().float() / 2} for s in shards}
        pieces = shard_state(shards, state)
        if on.engine.shards_optimizer:
            save_pieces(folder / file_prefix("part", on.engine.rank, on.engine.world_size), pieces)
        elif on.engine.rank == 0:
            save_pieces(folder / "part", pieces)
        on.engine.barrier()


def restore(made: Recipe, base: Path, folder: Path) -> int:
    """How many elements this rank read back, each in its place."""
    with bench(made, base) as on:
        shards = on.engine.shards()
        state = read_shard_state(shards, Saved(folder, "part"))
        for shard in shards:
            assert state[shard.name]["place"].equal(shard.positions().double()), shard.name
            assert state[shard.name]["half"].equal(shard.positions().float() / 2), shard.name
        return sum(shard.value.numel() for shard in shards)


@pytest.mark.parametrize(
    ("saved", "read"),
    [("ddp", "zero3"), ("zero3", "tensor"), ("tensor", "zero1"), ("zero1", "fsdp2"), ("fsdp2", "single"),
     ("copies", "zero2-offload"), ("zero2", "fsdp2-offload"), ("zero3-offload", "ddp"), ("single", "sequence")],
)  # fmt: skip
def test_state_as_large_as_the_parameters_moves_between_engines(
    workshop: Path, ranks: EngineRanks, tmp_path: Path, saved: str, read: str
) -> None:
    if saved == "single":
        store(asked(workshop, saved), workshop, tmp_path)
    else:
        ranks.call(store, asked(workshop, saved), workshop, tmp_path)
    made = asked(workshop, read)
    found = [restore(made, workshop, tmp_path)] if read == "single" else ranks.call(
        restore, made, workshop, tmp_path
    )  # fmt: skip
    assert all(count > 0 for count in found)


def masters(made: Recipe, base: Path, folder: Path) -> None:
    """bf16_master: before the first update the shard is the bf16 parameter, then its fp32 copy; what is written there
    is what forwards see, rounded; what is loaded is what it has."""
    with bench(made, base) as on:
        assert {shard.value.dtype for shard in on.engine.shards()} == {torch.bfloat16}
        on.gradients(0)
        on.update(0)
        assert {shard.value.dtype for shard in on.engine.shards()} == {torch.float32}
        before = on.whole()
        kept = [shard.value.clone() for shard in on.engine.shards()]
        if on.engine.sharded:
            save_pieces(folder / file_prefix("weights", on.engine.rank, 2), on.engine.weights())
        elif on.engine.rank == 0:
            save_pieces(folder / "weights", on.engine.weights())
        on.engine.barrier()
        move(on)
        moved = on.whole()
        for shard, value in zip(on.engine.shards(), kept, strict=True):
            shard.value.copy_(value)
        on.engine.wrote()
        back = on.whole()
        if on.engine.rank == 0:
            assert all(before[name].equal(back[name]) for name in before)
            assert not any(before[name].equal(moved[name]) for name in before)
        move(on)
        on.engine.load_weights(Saved(folder, "weights"))
        for shard, value in zip(on.engine.shards(), kept, strict=True):
            assert shard.value.equal(value.bfloat16().float()), shard.name


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_a_master_copy_and_its_parameter_agree(
    workshop: Path, ranks: EngineRanks, tmp_path: Path, strategy: str
) -> None:
    made = asked(workshop, strategy, ADAMW, training={"precision": "bf16_master"})
    if strategy == "single":
        masters(made, workshop, tmp_path)
    else:
        ranks.call(masters, made, workshop, tmp_path)


def closed(made: Recipe, base: Path) -> None:
    """A parameter that is not trained now has a value and no gradient, and can be written."""
    with bench(made, base) as on:
        names = [name for group in on.engine.optimizer.param_groups for name in group["names"]]
        opened = {name for group in on.engine.optimizer.param_groups[:1] for name in group["names"]}
        on.engine.train_only(opened)
        on.engine.module.train()
        on.gradients(0)
        shards = on.engine.shards()
        assert {s.name for s in shards} <= set(names)
        for shard in shards:
            assert (shard.gradient is not None) == (shard.name in opened), shard.name
        on.update(0)
        before = on.loss(1)
        for shard in on.engine.shards():
            if shard.name not in opened:
                shard.value.add_(0.1)
        on.engine.wrote()
        assert apart(on.loss(1), before) > 1e-4


@pytest.mark.parametrize("strategy", ["single", "ddp", *SHARDED, "zero2-offload"])
def test_what_is_not_trained_now_has_no_gradient(workshop: Path, ranks: EngineRanks, strategy: str) -> None:
    made = asked(workshop, strategy)
    if strategy == "single":
        closed(made, workshop)
    else:
        ranks.call(closed, made, workshop)
