"""`tunesmith plan`: what it prints, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.unit.test_planning import LLAMA
from tunesmith.errors import UserError
from tunesmith.recipe.load import load_recipe
from tunesmith_launch.cli import app

RECIPE = """\
# a model of which there is only the config
model:      {model_name_or_path: config.json}   # beside this file
data:
  train:      {path: rows.jsonl, format: text}
  max_length: 32  # tokens
objective:  {type: causal_lm}
training:   {global_batch_size: 16, precision: fp32}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def plan(*arguments: str, width: int = 200) -> str:
    done = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": str(width)}, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_a_config_is_enough_for_a_table_and_a_recommendation(recipe: Path) -> None:
    shown = plan(str(recipe), "--gpus", "4", "--gpu-memory", "1")
    for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        assert f"\n {strategy} " in shown
    assert "Recommended: ddp" in shown
    assert "the fastest of what fits" in shown or "nothing simpler" in shown
    assert "it agrees. Expect" in shown
    assert "every row is taken to be data.max_length = 32 tokens" in shown


def test_where_nothing_fits_the_plan_says_by_how_much(recipe: Path) -> None:
    # 4 M of parameters in the head alone: 0.1 GiB is not enough for any of it
    wide = [str(recipe), "model.config={vocab_size: 200000}", "data.max_length=64"]
    shown = plan(*wide, "--gpus", "2", "--gpu-memory", "0.1")
    assert "Nothing fits." in shown
    assert "too much" in shown
    assert "What weighs most: " in shown


def test_json_has_every_row_in_bytes(recipe: Path) -> None:
    about = json.loads(plan(str(recipe), "--gpus", "4", "--gpu-memory", "1", "--json"))
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "gather")
    assert len(about["rows"]) == 5 * 2 * 3  # strategies, checkpointing, micro-batches 1, 2, 4
    for row in about["rows"]:
        assert row["total"] == pytest.approx(sum(row[part] for part in parts))
        assert row["fits"] == (row["total"] <= about["usable_bytes"])
        assert row["seconds_per_step"] > 0
    (best,) = [row for row in about["rows"] if row["recommended"]]
    assert about["check"]["low"] < best["total"] < about["check"]["high"]


def test_apply_writes_a_recipe_that_loads_and_keeps_its_comments(recipe: Path) -> None:
    target = recipe.with_name("planned.yaml")
    about = json.loads(
        plan(str(recipe), "--gpus", "4", "--gpu-memory", "1", "--json", "--apply", str(target))
    )
    (best,) = [row for row in about["rows"] if row["recommended"]]
    written = load_recipe(target).recipe
    assert written.parallel.strategy == best["strategy"]
    assert written.training.per_device_train_batch_size == best["micro_batch"]
    assert written.model.gradient_checkpointing == best["gradient_checkpointing"]
    assert written.training.global_batch_size == 16
    text = target.read_text(encoding="utf-8")
    for comment in ("# a model of which there is only the config", "# beside this file", "# tokens"):
        assert comment in text
    assert recipe.read_text(encoding="utf-8") == RECIPE
    with pytest.raises(UserError, match="exists already"):
        plan(str(recipe), "--apply", str(target))


def test_apply_stays_beside_the_recipe(recipe: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(UserError, match="write beside"):
        plan(str(recipe), "--gpu-memory", "1", "--apply", str(elsewhere / "planned.yaml"))


def test_a_missing_model_is_named(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder \./missing"):
        plan(str(recipe), "model.model_name_or_path=./missing")
