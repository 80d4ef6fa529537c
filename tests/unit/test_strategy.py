"""`parallel.strategy: auto`: what it becomes, and what it says."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.support import tiny_recipe
from tunesmith.recipe import Recipe
from tunesmith.recipe.parallel import Auto
from tunesmith.strategy import settle


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TUNESMITH_DEVICE", "cpu")
    return tiny_recipe(tmp_path).model_copy(update={"parallel": Auto(timeout=77.0)})


def memory(monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    class Memory:
        def __init__(self) -> None:
            self.total = total

    monkeypatch.setattr(psutil, "virtual_memory", Memory)


def test_what_fits_is_copied(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 8 << 30)
    settled, why = settle(recipe, tmp_path, None)
    assert settled.parallel.strategy == "ddp"
    assert settled.parallel.timeout == 77.0
    assert "fits into 3.60" in why


def test_what_does_not_fit_is_sharded(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(monkeypatch, 400_000)
    settled, why = settle(recipe, tmp_path, None)
    assert settled.parallel.strategy == "fsdp2"
    assert "ddp needs" in why
    assert "does not fit" in why


def test_one_process_is_single(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert settle(recipe, tmp_path, None)[0].parallel.strategy == "single"


def test_an_optimizer_of_whole_matrices_is_not_cut(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(monkeypatch, 400_000)
    whole = tiny_recipe(tmp_path, optim={"name": "adafactor"}).model_copy(update={"parallel": Auto()})
    settled, why = settle(whole, tmp_path, None)
    assert settled.parallel.strategy == "ddp"
    assert "adafactor needs whole matrices" in why


def test_a_model_without_an_estimate_still_runs(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no such op on fake tensors")

    monkeypatch.setattr("tunesmith.strategy.choose_strategy", fails)
    settled, why = settle(recipe, tmp_path, None)
    assert settled.parallel.strategy == "ddp"
    assert "no estimate could be made (RuntimeError: no such op" in why
