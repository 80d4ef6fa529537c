"""A run that is stopped and continued ends with the bits of one that was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.numerics.rank_pool import Pools
from tests.support import assert_same_bits, final_weights, launch, metrics, run_dir, tiny_recipe
from tunesmith.errors import UserError
from tunesmith.recipe import Recipe
from tunesmith.run import Resume, run

pytestmark = pytest.mark.usefixtures("one_thread")

# acts on every process, after the given optimizer step is done and everything that follows on it
AFTER_STEP = """
import os, signal
from tunesmith.loop import Loop
plain = Loop._due
def due(self, step):
    if step == {step}:
        os.kill(os.getpid(), signal.{signal})
    return plain(self, step)
Loop._due = due
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Ten steps, never stopped."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("whole"))
    run(recipe, Path(), Resume())
    return recipe


def curve(recipe: Recipe) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(recipe)]


def test_killed_and_resumed_is_bitwise_the_whole_run(whole: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    killed = launch(recipe, driver=AFTER_STEP.format(step=7, signal="SIGKILL"))
    assert killed.returncode == -9
    assert (run_dir(recipe) / "checkpoint-5").is_dir()
    resumed = launch(recipe, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_bits(final_weights(recipe), final_weights(whole))
    assert curve(recipe) == curve(whole)


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT"])
def test_a_signal_finishes_the_step_saves_and_exits_5(whole: Recipe, tmp_path: Path, signal: str) -> None:
    recipe = tiny_recipe(tmp_path)
    stopped = launch(recipe, driver=AFTER_STEP.format(step=2, signal=signal))
    assert stopped.returncode == 5, stopped.stderr
    assert "Traceback" not in stopped.stderr
    saved = sorted(path.name for path in run_dir(recipe).glob("checkpoint-*"))
    assert len(saved) == 1
    assert not (run_dir(recipe) / "final").exists()
    run(recipe, Path(), Resume(resume=True))
    assert_same_bits(final_weights(recipe), final_weights(whole))


def test_a_broken_checkpoint_is_named_and_skipped(
    whole: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path)
    run(recipe, Path(), Resume())
    damaged = run_dir(recipe) / "checkpoint-10" / "optimizer.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(bytes(data))
    capsys.readouterr()
    run(recipe, Path(), Resume(resume=True))
    assert "skipped checkpoint-10" in capsys.readouterr().out
    assert_same_bits(final_weights(recipe), final_weights(whole))


def test_another_recipe_does_not_resume(tmp_path: Path) -> None:
    run(tiny_recipe(tmp_path), Path(), Resume())
    other = tiny_recipe(tmp_path, optim={"learning_rate": 2e-2})
    with pytest.raises(UserError, match=r"optim\.learning_rate was 0\.01 and is 0\.02"):
        run(other, Path(), Resume(resume=True))


def test_a_used_folder_is_not_overwritten_unasked(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    run(recipe, Path(), Resume())
    before = (run_dir(recipe) / "metrics.jsonl").read_bytes()
    refused = launch(recipe)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert (run_dir(recipe) / "metrics.jsonl").read_bytes() == before
    run(recipe, Path(), Resume(overwrite=True))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=pytest.mark.slow), "fsdp2"])
def test_two_processes_resume_bitwise(pools: Pools, tmp_path: Path, strategy: str) -> None:
    parallel = {"strategy": strategy}
    whole, recipe = (tiny_recipe(tmp_path / name, parallel=parallel) for name in "ab")
    pools[2].run(whole, Path())
    stopped = launch(recipe, processes=2, driver=AFTER_STEP.format(step=2, signal="SIGTERM"))
    assert stopped.returncode != 0
    about = json.loads((run_dir(recipe) / "exit.json").read_text(encoding="utf-8"))
    assert about["code"] == 5
    resumed = launch(recipe, "--resume", processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_bits(final_weights(recipe), final_weights(whole))
