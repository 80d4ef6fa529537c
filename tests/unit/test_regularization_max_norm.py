"""Max-norm on rows however shards cut them, and the values of penalties."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.engine.shards import Shard
from tunesmith.errors import UserError
from tunesmith.parts import StepPart
from tunesmith.regularization.max_norm import MaxNorm
from tunesmith.regularization.penalties import penalty


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class OneRank:
    """What a part asks of an engine, of one process that holds pieces of a matrix."""

    device = torch.device("cpu")
    world_size = mean_size = 1

    def __init__(self, model: nn.Module, tag: str, pieces: list[Shard]) -> None:
        self.train_module = nn.ModuleDict({"model": model})
        names = [f"model.{name}" for name, _ in model.named_parameters()]
        self.optimizer = type("Groups", (), {"param_groups": [{"tag": tag, "names": names}]})
        self.pieces = pieces
        self.written = 0

    def shards(self) -> list[Shard]:
        return self.pieces

    def sum(self, values: Tensor) -> Tensor:
        return values

    def wrote(self) -> None:
        self.written += 1


def begun(part: StepPart, engine: Any) -> StepPart:
    part.begin(engine, None)  # pyright: ignore[reportArgumentType]
    return part


def pieces(name: str, value: Tensor, cuts: list[int]) -> list[Shard]:
    """Runs of a matrix, each as if trained."""
    flat = value.view(-1)
    edges = [0, *cuts, flat.numel()]
    return [Shard(name, flat[a:b], torch.zeros(b - a), tuple(value.shape), a) for a, b in pairwise(edges)]


@pytest.mark.parametrize("cuts", [[], [8], [3], [1, 2, 3], [6, 7, 18], [4, 8, 12]])
@pytest.mark.parametrize("conv1d", [False, True])
def test_rows_are_projected_however_they_are_cut(cuts: list[int], conv1d: bool) -> None:
    from transformers.pytorch_utils import Conv1D

    layer: Any = Conv1D(4, 6) if conv1d else nn.Linear(4, 6, bias=False)
    value = draw(6, 4)
    expected = torch.renorm(value, 2, 1 if conv1d else 0, 1.5)
    assert not expected.equal(value)
    engine = OneRank(
        nn.ModuleDict({"layer": layer}), "decay", pieces("model.layer.weight", value.clone(), cuts)
    )
    part = begun(MaxNorm(1.5, frozenset({"model.layer.weight"})), engine)
    part.penalize(0, torch.ones(()))
    part.after_step(0, torch.zeros(()))
    got = torch.cat([shard.value for shard in engine.pieces]).view(6, 4)
    assert torch.allclose(got, expected, rtol=1e-5)
    short = value.norm(dim=0 if conv1d else 1) <= 1.5
    kept, before = (got.T, value.T) if conv1d else (got, value)
    assert kept[short].equal(before[short])
    assert engine.written == 1


def test_a_skipped_step_and_what_is_not_trained_are_not_projected() -> None:
    value = draw(6, 4) * 10
    layer = nn.ModuleDict({"layer": nn.Linear(4, 6, bias=False)})
    for skip, trained in ((1.0, True), (0.0, False)):
        parts = pieces("model.layer.weight", value.clone(), [7])
        if not trained:
            parts = [replace(shard, gradient=None) for shard in parts]
        engine = OneRank(layer, "decay", parts)
        part = begun(MaxNorm(1.5, None), engine)
        part.penalize(0, torch.ones(()))
        part.after_step(0, torch.tensor(skip))
        assert torch.cat([shard.value for shard in engine.pieces]).equal(value.view(-1))


def test_a_bias_beside_its_matrix_stays_as_it_is() -> None:
    weight, bias = draw(6, 4) * 10, draw(6) * 10
    both = [*pieces("model.layer.weight", weight.clone(), []), *pieces("model.layer.bias", bias.clone(), [])]
    engine = OneRank(nn.ModuleDict({"layer": nn.Linear(4, 6)}), "decay", both)
    part = begun(MaxNorm(1.5, frozenset({"model.layer.weight", "model.layer.bias"})), engine)
    part.penalize(0, torch.ones(()))
    part.after_step(0, torch.zeros(()))
    projected, kept = (shard.value.view(-1) for shard in engine.pieces)
    assert torch.allclose(projected, torch.renorm(weight, 2, 0, 1.5).view(-1), rtol=1e-5)
    assert kept.equal(bias)


def test_max_norm_refuses_what_has_no_units() -> None:
    engine = OneRank(nn.ModuleDict({"layer": nn.Linear(4, 6)}), "decay", [])
    with pytest.raises(UserError, match=r"max_norm\.parameters: none of these is a matrix"):
        MaxNorm(1.5, frozenset({"model.layer.bias"})).begin(engine, None)  # pyright: ignore[reportArgumentType]
    engine = OneRank(nn.ModuleDict({"layer": nn.Linear(4, 6)}), "no_decay", [])
    with pytest.raises(UserError, match=r"regularization\.max_norm: no weight matrix is trained"):
        MaxNorm(1.5, None).begin(engine, None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("shape", [(1,), (511,), (3, 700), (2048, 33)])
def test_penalties_are_those_of_fp64(shape: tuple[int, ...]) -> None:
    value = draw(*shape)
    assert float(penalty("l1", value)) == pytest.approx(float(value.double().abs().sum()), rel=1e-6)
    assert float(penalty("l2", value)) == pytest.approx(float(value.double().square().sum() / 2), rel=1e-6)
