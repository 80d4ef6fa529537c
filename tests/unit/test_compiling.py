"""torch.compile: layers that are one graph, and those that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support import launch, metrics, tiny_recipe
from tunesmith.compiling import compile_layers, explain_break
from tunesmith.errors import UserError


class Breaking(nn.Module):
    """A layer whose graph depends on a number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("a graph break")
        return self.other(self.linear(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Breaking(), Breaking()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_layer_that_breaks_the_graph_is_told() -> None:
    model = Stack()
    assert compile_layers(model) == 2
    with pytest.raises(RuntimeError) as caught:
        model(torch.ones(2, 4))
    told = explain_break(caught.value)
    assert told is not None
    assert told.startswith("training.torch_compile: a layer does not compile as one graph")
    assert explain_break(RuntimeError("something else")) is None


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.torch_compile: Linear has no stack of layers"):
        compile_layers(nn.Linear(2, 2))


@pytest.mark.slow
def test_compiled_layers_train_alike(tmp_path: Path) -> None:
    plain, compiled = (
        tiny_recipe(tmp_path / str(on), training={"torch_compile": on}, model={"dropout": 0.0})
        for on in (False, True)
    )
    for recipe in (plain, compiled):
        done = launch(recipe)
        assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in metrics(recipe) if "loss" in row] for recipe in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
