"""`tunesmith ensemble` from runs to answers, on tiny runs of every kind that can be combined."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.unit.conftest import MakeRecipe, Trained
from tunesmith.commands import ensemble as module
from tunesmith.commands.average import average
from tunesmith.commands.ensemble import (
    checkpoints_of,
    ensemble_rows,
    evaluate_ensemble,
    make_ensemble,
    predict_ensemble,
)
from tunesmith.commands.evaluate import evaluate_run
from tunesmith.commands.finished import Weights, open_run
from tunesmith.ensemble.options import Asked
from tunesmith.ensemble.record import read_ensemble
from tunesmith.errors import UserError
from tunesmith.recipe.load import load_recipe, shipped_recipes
from tunesmith.run import Resume, run
from tunesmith.schedules import multiplier
from tunesmith_launch.cli import app

KINDS = ("single_label", "pairs", "multi_label", "regression", "token_classification", "question_answering")
Pair = Callable[[str], list[Weights]]


@pytest.fixture(scope="module")
def pair(workshop: Path, make_recipe: MakeRecipe, trained: Trained) -> Pair:
    """pair(case) → two runs of other seeds and lengths of input."""
    done: dict[str, list[Weights]] = {}

    def once(case: str) -> list[Weights]:
        if case not in done:
            name = f"{case}-other"
            made = make_recipe(case, training={"seed": 5, "max_steps": 4}, run_name=name)
            run(made, workshop, Resume())
            done[case] = [Weights(trained(case)), Weights(workshop / "runs" / name)]
        return done[case]

    return once


@pytest.mark.parametrize("case", KINDS)
def test_the_table_holds_what_the_runs_reach_alone(pair: Pair, tmp_path: Path, case: str) -> None:
    members = pair(case)
    made = make_ensemble(members, "mean", tmp_path / "e")
    names = [next(iter(row.values())) for row in made.table]
    assert names[:3] == [str(members[0]), str(members[1]), "mean of members"]
    alone = [evaluate_run(open_run(m.run_dir), "eval").found.metrics for m in members]
    shown = [key for key in made.table[0] if key in alone[0]]
    for key in shown:
        if key != "loss" or case != "question_answering":  # whose loss here is of texts
            for row, found in zip(made.table, alone, strict=False):
                assert row[key] == pytest.approx(found[key], abs=1e-5), key
            assert made.table[2][key] == pytest.approx(np.mean([found[key] for found in alone]), abs=1e-5)
    assert (
        made.rows == evaluate_run(open_run(members[0].run_dir), "eval").rows or case == "question_answering"
    )


@pytest.mark.parametrize("case", [case for case in KINDS if case != "pairs"])
@pytest.mark.parametrize("method", ["vote", "weighted", "stack"])
def test_every_method_is_made_opened_measured_and_asked(
    pair: Pair, tmp_path: Path, case: str, method: Any
) -> None:
    members, out = pair(case), tmp_path / "e"
    refused = {
        ("regression", "vote"): "numbers are no votes",
        ("question_answering", "stack"): "not a fixed set",
    }
    if (case, method) in refused:
        with pytest.raises(UserError, match=refused[case, method]):
            make_ensemble(members, method, out)
        assert not out.exists()
        return
    made = make_ensemble(members, method, out)
    again = evaluate_ensemble(read_ensemble(out), "eval")
    assert again.metrics == pytest.approx(made.metrics)
    test = evaluate_ensemble(read_ensemble(out), "test")
    assert test.path.name == "evaluation-test.json"
    written = json.loads(test.path.read_text(encoding="utf-8"))
    assert written["metrics"] == pytest.approx(test.metrics)
    path = open_run(members[0].run_dir).recipe.data.train[0].path
    answers = [
        answer
        for _, answer in predict_ensemble(read_ensemble(out), ensemble_rows(read_ensemble(out), path, []))
    ]
    keys = {
        "single_label": {"label", "score"},
        "multi_label": {"labels", "scores"},
        "regression": {"value"},
        "token_classification": {"tokens", "tags"},
        "question_answering": {"id", "answer", "score"},
    }[case]
    assert answers
    assert all(keys <= answer.keys() for answer in answers)
    if case == "single_label":
        opened = read_ensemble(out)
        said = predict_ensemble(opened, ensemble_rows(opened, None, ["red river"]), scores=True)
        ((_, one),) = said
        assert one["text"] == "red river"
        assert sum(one["scores"].values()) == pytest.approx(1, abs=1e-6)


def test_a_member_alone_in_weight_answers_alone(pair: Pair, tmp_path: Path) -> None:
    """Weights (1, 0) give the first member's metrics."""
    members, out = pair("single_label"), tmp_path / "e"
    make_ensemble(members, "weighted", out)
    path = out / "ensemble.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    assert sum(about["weights"]) == pytest.approx(1.0)
    about["weights"] = [1.0, 0.0]
    path.write_text(json.dumps(about), encoding="utf-8")
    found = evaluate_ensemble(read_ensemble(out), "test").metrics
    alone = evaluate_run(open_run(members[0].run_dir), "test").found.metrics
    assert found == pytest.approx(alone, abs=1e-5)


def test_weights_are_fitted_on_eval_rows_and_the_test_rows_are_not_read(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits: list[str] = []
    real = module.split_rows
    from tunesmith.ensemble import members as own

    def watched(described: Any, split: Any) -> Any:
        splits.append(split)
        return real(described, split)

    monkeypatch.setattr(own, "split_rows", watched)
    monkeypatch.setattr(module, "split_rows", watched)
    made = make_ensemble(pair("single_label"), "stack", tmp_path / "e")
    assert set(splits) == {"eval"}
    assert "fitted on these rows" in str(made.table[-1])
    evaluate_ensemble(read_ensemble(tmp_path / "e"), "test")
    assert "test" in splits


def test_out_of_fold_figures_are_not_those_of_the_fit(pair: Pair, tmp_path: Path) -> None:
    members = pair("single_label")
    fitted = make_ensemble(members, "stack", tmp_path / "a")
    left_out = make_ensemble(members, "stack", tmp_path / "b", 4)
    assert "out of fold" in str(left_out.table[-1])
    assert left_out.metrics["loss"] > fitted.metrics["loss"]
    a, b = (read_ensemble(tmp_path / name).combiner.stack for name in "ab")
    assert a is not None
    assert b is not None
    assert np.array_equal(a.weight, b.weight)  # what is kept is fitted on all rows


def test_answers_are_kept_and_used_again(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members, out = pair("token_classification"), tmp_path / "e"
    first = make_ensemble(members, "mean", out)
    from tunesmith.ensemble import members as own

    def fail(*_: Any) -> Any:
        raise AssertionError("a member was opened again")

    monkeypatch.setattr(own, "open_run", fail)
    with pytest.raises(UserError, match="--overwrite"):
        make_ensemble(members, "mean", out)
    assert make_ensemble(members, "mean", out, overwrite=True).metrics == pytest.approx(first.metrics)


def test_checkpoints_of_one_run_are_members(trained: Trained, tmp_path: Path) -> None:
    run_dir = trained("single_label")
    members = checkpoints_of(run_dir, "all")
    assert [m.checkpoint for m in members] == [1, 2]
    made = make_ensemble(members, "mean", tmp_path / "e")
    assert str(members[0]).endswith(":checkpoint-1")
    alone = evaluate_run(open_run(run_dir, 1), "eval").found.metrics
    assert made.table[0]["accuracy"] == pytest.approx(alone["accuracy"])
    with pytest.raises(UserError, match="has no checkpoint-7; it has 1, 2"):
        checkpoints_of(run_dir, "1,7")
    with pytest.raises(UserError, match="two or more"):
        checkpoints_of(run_dir, "1")


def test_labels_in_another_order_are_put_in_order(
    workshop: Path, make_recipe: MakeRecipe, trained: Trained, tmp_path: Path
) -> None:
    made = make_recipe(
        "single_label", objective={"labels": ["d", "c", "b", "a"]}, run_name="turned", training={"seed": 9}
    )
    run(made, workshop, Resume())
    members = [Weights(trained("single_label")), Weights(workshop / "runs" / "turned")]
    found = make_ensemble(members, "mean", tmp_path / "e")
    alone = evaluate_run(open_run(members[1].run_dir), "eval").found.metrics
    assert found.table[1]["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert found.table[1]["accuracy"] == alone["accuracy"]


def test_what_cannot_be_combined_is_refused_by_name(pair: Pair, trained: Trained, tmp_path: Path) -> None:
    single = pair("single_label")
    with pytest.raises(UserError, match=r"objective sft cannot be combined.*tunesmith average"):
        make_ensemble([Weights(trained("sft")), *single], "mean", tmp_path / "e")
    with pytest.raises(UserError, match="its answers are numbers"):
        make_ensemble([single[0], Weights(trained("regression"))], "mean", tmp_path / "e")
    with pytest.raises(UserError, match="its labels are not those of"):
        make_ensemble([single[0], Weights(trained("pairs"))], "mean", tmp_path / "e")
    with pytest.raises(UserError, match="two members or more"):
        make_ensemble(single[:1], "mean", tmp_path / "e")
    with pytest.raises(UserError, match="named twice"):
        make_ensemble([single[0], single[0]], "mean", tmp_path / "e")
    with pytest.raises(UserError, match="fits nothing"):
        make_ensemble(single, "mean", tmp_path / "e", 5)
    with pytest.raises(UserError, match="is in use"):
        make_ensemble(single, "mean", single[0].run_dir)


def test_other_eval_rows_are_refused(
    pair: Pair, workshop: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    split = {"eval": 0.2, "test": 0.2, "seed": 8}
    run(make_recipe("single_label", data={"split": split}, run_name="split-8"), workshop, Resume())
    with pytest.raises(UserError, match=r"split-8: its eval rows are not those of"):
        make_ensemble([*pair("single_label"), Weights(workshop / "runs" / "split-8")], "mean", tmp_path / "e")


def test_a_member_that_changed_or_went_is_noticed(pair: Pair, tmp_path: Path) -> None:
    members = []
    for member in pair("single_label"):
        shutil.copytree(member.run_dir, tmp_path / member.run_dir.name)
        members.append(Weights(tmp_path / member.run_dir.name))
    make_ensemble(members, "mean", tmp_path / "e")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in [*(m.run_dir for m in members), tmp_path / "e"]:
        path.rename(moved / path.name)
    assert evaluate_ensemble(read_ensemble(moved / "e"), "eval").rows  # all were moved together
    weights = moved / members[1].run_dir.name / "final" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(UserError, match="is not what it was"):
        read_ensemble(moved / "e")
    shutil.rmtree(moved / members[1].run_dir.name)
    with pytest.raises(UserError, match="is gone"):
        read_ensemble(moved / "e")


def test_the_command_line(pair: Pair, tmp_path: Path) -> None:
    runner, out = CliRunner(), str(tmp_path / "e")
    runs = [str(member.run_dir) for member in pair("single_label")]
    done = runner.invoke(app, ["ensemble", *runs, "--method", "weighted", "--out-of-fold", "3", "--out", out])
    assert done.exit_code == 0, done.output
    assert "mean of members" in done.output
    done = runner.invoke(app, ["evaluate", out, "--split", "test"])
    assert done.exit_code == 0, done.output
    assert "evaluation-test.json" in done.output
    done = runner.invoke(app, ["predict", out, "--text", "red river a"])
    assert json.loads(done.stdout).keys() == {"text", "label", "score"}
    for arguments, said in (
        (["ensemble", *runs, "--split", "test", "--out", out + "2"], "--split test"),
        (["ensemble", *runs, "--checkpoints", "all"], "goes with one run"),
        (["evaluate", out, "--checkpoint", "1"], "--checkpoint"),
        (["export", out, str(tmp_path / "x")], "is an ensemble"),
        (["predict", out, "--text", "a", "--num-beams", "2"], "generates no text"),
    ):
        done = runner.invoke(app, arguments)
        assert isinstance(done.exception, UserError), arguments
        assert said in str(done.exception)


def test_snapshots_are_taken_where_each_cycle_is_lowest(
    workshop: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """The shipped recipe's numbers, and a small run with the same proportions: every cycle's end is kept."""
    shipped = load_recipe(shipped_recipes()["banking77_snapshots"]).recipe
    steps, every = shipped.training.max_steps, shipped.checkpoint.save_steps
    assert steps is not None
    assert isinstance(every, int)
    rates = [multiplier(shipped.schedule, step, steps) for step in range(steps)]
    lowest = [step for step in range(steps) if step + 1 == steps or rates[step + 1] == 1.0]
    assert [step + 1 for step in lowest] == list(range(every, steps + 1, every))
    made = make_recipe(
        "single_label",
        training={"max_steps": 4},
        schedule={"lr_scheduler_type": "cosine_with_restarts", "num_cycles": 4},
        checkpoint={"save_steps": 1, "save_total_limit": None},
        run_name="snapshots",
    )
    run(made, workshop, Resume())
    members = checkpoints_of(workshop / "runs" / "snapshots", "all")
    assert [member.checkpoint for member in members] == [1, 2, 3, 4]
    assert len(make_ensemble(members, "mean", tmp_path / "e").table) == 4 + 3


def test_temperatures_of_members_count_and_their_thresholds_do_not(
    workshop: Path, pair: Pair, tmp_path: Path
) -> None:
    members: list[Weights] = []
    decided: list[dict[str, Any]] = [{"temperature": 0.25}, {"offsets": [9.0, 0.0, 0.0, 0.0]}]
    for member, decisions in zip(pair("single_label"), decided, strict=True):
        folder = tmp_path / member.run_dir.name
        shutil.copytree(member.run_dir, folder)
        state = json.loads((folder / "objective.json").read_text(encoding="utf-8"))
        (folder / "objective.json").write_text(json.dumps(state | {"decisions": decisions}), encoding="utf-8")
        members.append(Weights(folder))
    plain = make_ensemble(pair("single_label"), "mean", tmp_path / "plain")
    found = make_ensemble(members, "mean", tmp_path / "e")
    assert found.table[0]["loss"] != pytest.approx(plain.table[0]["loss"], abs=1e-4)
    assert found.table[0]["accuracy"] == plain.table[0]["accuracy"]
    assert found.table[1]["accuracy"] == plain.table[1]["accuracy"]
    assert found.table[1]["loss"] == pytest.approx(plain.table[1]["loss"])
    made = average([str(m.run_dir) for m in members], Asked("uniform"), tmp_path / "soup")
    assert "thresholds and temperatures of the members were left out" in made.note
    assert "decisions" not in json.loads((tmp_path / "soup" / "objective.json").read_text(encoding="utf-8"))


def test_lists_are_refused(pair: Pair, tmp_path: Path) -> None:
    from tunesmith.commands.finished import describe_run
    from tunesmith.ensemble.members import kind_of
    from tunesmith.objectives.ranking import RankingObjective

    described = describe_run(pair("regression")[0].run_dir)
    described.objective.__class__ = RankingObjective
    with pytest.raises(UserError, match="ranks lists"):
        kind_of(described)
