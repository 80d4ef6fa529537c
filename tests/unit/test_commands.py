"""The commands that look at a recipe or a run, as they are typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tunesmith.errors import UserError
from tunesmith.recipe import Recipe
from tunesmith.recipe.load import dump_recipe
from tunesmith_launch.inspect_commands import register

MakeRecipe = Callable[..., Recipe]
Trained = Callable[[str], Path]


@pytest.fixture
def typed() -> Callable[..., Any]:
    """typed("check", …) → exit code and output; errors of ours are raised, as `main` expects them."""
    app = typer.Typer()
    register(app)

    def run(*words: object) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)

    return run


@pytest.fixture
def recipe(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    made = make_recipe("single_label").model_copy(update={"output_dir": str(tmp_path / "runs")})
    path = tmp_path / "r.yaml"
    path.write_text(dump_recipe(made), encoding="utf-8")
    return path


def test_check(typed: Any, recipe: Path) -> None:
    done = typed("check", recipe)
    assert done.exit_code == 0
    assert "✓ memory: the longest batch" in done.stdout
    assert "0 errors" in done.stdout.splitlines()[-1]
    done = typed("check", recipe, "data.train.0.path=/nowhere/rows.jsonl")
    assert done.exit_code == 2
    assert "✗ data: /nowhere/rows.jsonl: there is no folder /nowhere" in done.stdout


def test_check_of_a_faulty_recipe_names_every_fault(typed: Any, recipe: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)max_length: must be .*learning_rate: must be"):
        typed("check", recipe, "optim.learning_rate=-1", "data.max_length=0")


def test_preview(typed: Any, recipe: Path) -> None:
    done = typed("preview", recipe, "--rows", 2, "--split", "eval")
    assert done.exit_code == 0
    assert done.stdout.count("eval sample") == 2
    assert "label: [[" in done.stdout


def test_evaluate(typed: Any, trained: Trained) -> None:
    done = typed("evaluate", trained("single_label"), "--split", "test")
    assert done.exit_code == 0
    assert "accuracy" in done.stdout
    assert "in the run" in done.stdout
    assert "evaluation-test.json" in done.stdout


def test_predict(typed: Any, trained: Trained, tmp_path: Path) -> None:
    run_dir = trained("single_label")
    (tmp_path / "in.txt").write_text("red\n\n", encoding="utf-8")
    done = typed("predict", run_dir, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.jsonl")
    assert done.exit_code == 0
    assert done.stdout == ""
    assert "2 rows, 1 errors, written to" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [set(row) for row in rows] == [{"line", "label", "score"}, {"line", "error"}]
    printed = typed("predict", run_dir, "--input", tmp_path / "in.txt")
    assert [json.loads(line) for line in printed.stdout.splitlines()] == rows
    said = typed("predict", run_dir, "--text", "red", "--text", "blue")
    assert [json.loads(line)["text"] for line in said.stdout.splitlines()] == ["red", "blue"]


def test_predict_needs_one_kind_of_input(typed: Any, trained: Trained) -> None:
    run_dir = trained("single_label")
    for words in ((), ("--input", "a.txt", "--text", "red")):
        with pytest.raises(UserError, match="one of the two"):
            typed("predict", run_dir, *words)


def test_export(typed: Any, trained: Trained, tmp_path: Path) -> None:
    done = typed("export", trained("single_label"), tmp_path / "out", "--dtype", "bf16")
    assert done.exit_code == 0
    assert "outputs differ from the trained fp32 model's by at most" in done.stdout
    assert (tmp_path / "out" / "README.md").is_file()
