"""`tunesmith train --seeds`: which runs it makes, in which order, and what it goes on from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support import tiny_recipe
from tunesmith.ending import Ending, record
from tunesmith.errors import UserError
from tunesmith.recipe.load import dump_recipe
from tunesmith_launch.cli import app
from tunesmith_launch.seeds import members, parse_seeds, train_seeds


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(dump_recipe(tiny_recipe(tmp_path / "tiny")), encoding="utf-8")
    return path


class Trainer:
    """Stands for the training: leaves what a run leaves, with the codes it is given."""

    def __init__(self, recipe: Path, codes: dict[int, int]) -> None:
        self.recipe, self.codes = recipe, codes
        self.seen: list[tuple[int, bool]] = []

    def __call__(self, overrides: Sequence[str], resume: bool) -> int:
        seed = next(int(text[14:]) for text in overrides if text.startswith("training.seed="))
        (member,) = members(self.recipe, [o for o in overrides if "seed" not in o], [seed])
        self.seen.append((seed, resume))
        member.folder.mkdir(parents=True, exist_ok=True)
        (member.folder / "metrics.jsonl").touch()
        (member.folder / "exit.json").unlink(missing_ok=True)
        code = self.codes.get(seed, 0)
        record(member.folder, Ending(code, "done", 0, 1))
        if code == 0:
            (member.folder / "final").mkdir(exist_ok=True)
        return code


def test_seeds_are_a_number_or_a_list() -> None:
    assert parse_seeds("3") == [0, 1, 2]
    assert parse_seeds("4, 9") == [4, 9]
    for text, said in (
        ("1", "two or more"),
        ("a,b", "write how many"),
        ("2,2", "twice"),
        ("-1,2", "write how"),
    ):
        with pytest.raises(UserError, match=said):
            parse_seeds(text)


def test_each_seed_has_a_run_of_its_own(recipe: Path) -> None:
    found = members(recipe, ["optim.learning_rate=0.5", "run_name=mine"], [2, 5])
    assert [member.folder.name for member in found] == ["mine-seed2", "mine-seed5"]
    assert found[1].overrides == ("optim.learning_rate=0.5", "training.seed=5", "run_name=mine-seed5")
    with pytest.raises(UserError, match="goes without the override"):
        members(recipe, ["training.seed=3"], [0, 1])


def test_one_after_the_other_and_what_to_type_then(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(recipe, {})
    assert train_seeds(recipe, [], [0, 1], trainer, resume=False, replace=False) == 0
    assert trainer.seen == [(0, False), (1, False)]
    said = capsys.readouterr().out
    assert "tunesmith average" in said  # a causal LM's answers are texts
    assert "tiny-seed0" in said
    assert "--method greedy" in said
    with pytest.raises(UserError, match="tiny-seed0 holds a run"):
        train_seeds(recipe, [], [0, 1], trainer, resume=False, replace=False)


def test_a_run_that_stopped_itself_lets_the_others_run_and_the_worst_code_counts(recipe: Path) -> None:
    trainer = Trainer(recipe, {0: 4})
    assert train_seeds(recipe, [], [0, 1], trainer, resume=False, replace=False) == 4
    assert [seed for seed, _ in trainer.seen] == [0, 1]


def test_an_interruption_ends_the_row_and_resume_passes_over_what_is_done(recipe: Path) -> None:
    trainer = Trainer(recipe, {1: 5})
    assert train_seeds(recipe, [], [0, 1, 2], trainer, resume=False, replace=False) == 5
    assert [seed for seed, _ in trainer.seen] == [0, 1]
    again = Trainer(recipe, {})
    assert train_seeds(recipe, [], [0, 1, 2], again, resume=True, replace=False) == 0
    assert again.seen == [(1, True), (2, True)]


def test_what_would_be_started_is_shown(recipe: Path) -> None:
    done = CliRunner().invoke(app, ["train", str(recipe), "--seeds", "2", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "training.seed=0 run_name=tiny-seed0" in done.output
    assert "training.seed=1 run_name=tiny-seed1" in done.output
    for arguments, said in (
        (["--seeds", "2", "--num-machines", "2"], "--num-machines"),
        (["--seeds", "2", "--resume", "--overwrite"], "exclude each other"),
    ):
        failed = CliRunner().invoke(app, ["train", str(recipe), *arguments])
        assert isinstance(failed.exception, UserError)
        assert said in str(failed.exception)


@pytest.mark.slow
def test_two_seeds_are_trained(recipe: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(
        app, ["train", str(recipe), "training.max_steps=2", "checkpoint.save_steps=1", "--seeds", "2"]
    )
    assert done.exit_code == 0, done.output
    runs = tmp_path / "tiny" / "runs"
    endings = [json.loads((runs / f"tiny-seed{s}" / "exit.json").read_text(encoding="utf-8")) for s in (0, 1)]
    assert [ending["code"] for ending in endings] == [0, 0]
    weights = [(runs / f"tiny-seed{s}" / "final" / "model.safetensors").read_bytes() for s in (0, 1)]
    assert weights[0] != weights[1]
    again = runner.invoke(
        app,
        ["train", str(recipe), "training.max_steps=2", "checkpoint.save_steps=1", "--seeds", "2", "--resume"],
    )
    assert again.exit_code == 0
