"""tune_thresholds and calibrate in a run: fitted on `eval` alone, in all later answers and metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests.numerics.objective_cases import CASES, SGD, Layout, recipe
from tests.unit.conftest import MakeRecipe
from tunesmith.commands.evaluate import evaluate_run
from tunesmith.commands.finished import open_run
from tunesmith.decisions import Decisions
from tunesmith.errors import UserError
from tunesmith.run import Resume, run
from tunesmith.tracking import metrics_file

BOTH = {"tune_thresholds": {"metric": "macro_f1"}, "calibrate": "temperature"}


@pytest.mark.parametrize("case", ["single_label", "multi_label", "pairs"])
def test_what_is_decided_is_kept_and_used(workshop: Path, make_recipe: MakeRecipe, case: str) -> None:
    """No other decision of the same kind is better on the evaluation rows; evaluate and predict see the same."""
    made = make_recipe(case, evaluation={**BOTH, "eval_steps": None}, run_name=f"decided-{case}")
    run(made, workshop, Resume())
    folder = workshop / "runs" / f"decided-{case}"
    state = json.loads((folder / "objective.json").read_text())["decisions"]
    about = json.loads((folder / "decisions.json").read_text())
    assert about["decided"] == state
    assert state["metric"] == "macro_f1"
    assert about["eval"]["macro_f1"] >= about["eval"]["macro_f1_untuned"]
    if "temperature" in state:
        assert about["eval"]["log_loss"] <= about["eval"]["log_loss_untuned"]
    (tested,) = [row for row in metrics_file.read(folder / "metrics.jsonl") if "test_loss" in row]
    assert {
        "test_macro_f1",
        "test_macro_f1_untuned",
        "test_pr_auc",
        "test_ece",
        "test_brier",
    } <= tested.keys()
    (evaluated,) = [row for row in metrics_file.read(folder / "metrics.jsonl") if "eval_loss" in row]
    assert evaluated["eval_macro_f1"] == pytest.approx(about["eval"]["macro_f1_untuned"])

    finished = open_run(folder)
    again = evaluate_run(finished, "test")
    assert again.found.metrics["macro_f1"] == pytest.approx(tested["test_macro_f1"])
    assert again.found.metrics["log_loss"] == pytest.approx(tested["test_log_loss"])
    decisions: Decisions = finished.objective.decisions  # pyright: ignore[reportAttributeAccessIssue]
    assert decisions == Decisions.of(state)


def test_presented_answers_follow_the_decisions(workshop: Path, trained: Any) -> None:
    finished = open_run(trained("single_label"))
    objective: Any = finished.objective
    p = np.full(len(objective.labels), 0.1)
    p[0] = 1 - p[1:].sum()
    assert objective.presentable(None, 0, p)["label"] == objective.labels[0]
    offsets = (0.0,) * (len(p) - 1) + (20.0,)
    objective.decisions = Decisions(temperature=2.0, offsets=offsets)
    shown = objective.presentable(None, 0, p)
    assert shown["label"] == objective.labels[-1]
    cooled = p**0.5 / (p**0.5).sum()
    assert shown["score"] == pytest.approx(cooled[-1], abs=1e-5)


def test_metrics_that_are_asked_for_are_shown_both_ways(workshop: Path, make_recipe: MakeRecipe) -> None:
    made = make_recipe(
        "single_label", evaluation={**BOTH, "metrics": ["macro_f1", "pr_auc"], "metric_for_best": "macro_f1"},
        run_name="decided-few",
    )  # fmt: skip
    run(made, workshop, Resume())
    rows = metrics_file.read(workshop / "runs" / "decided-few" / "metrics.jsonl")
    (tested,) = [row for row in rows if "test_loss" in row]
    shown = {key for key in tested if key.startswith("test_")} - {"test_seconds", "test_pr_auc_untuned"}
    assert shown == {"test_loss", "test_macro_f1", "test_pr_auc", "test_macro_f1_untuned"}
    state = json.loads((workshop / "runs" / "decided-few" / "objective.json").read_text())["decisions"]
    assert ("test_pr_auc_untuned" in tested) == ("temperature" in state)


def test_a_run_without_decisions_says_nothing_of_them(trained: Any) -> None:
    folder: Path = trained("single_label")
    assert "decisions" not in json.loads((folder / "objective.json").read_text())
    assert not (folder / "decisions.json").exists()
    finished = open_run(folder)
    table = evaluate_run(finished, "eval").found
    assert not [name for name in table.metrics if name.endswith("_untuned")]


@pytest.mark.parametrize(
    ("case", "evaluation", "message"),
    [
        (
            "causal_lm",
            {"calibrate": "temperature"},
            r"evaluation\.calibrate: is for classification with labels",
        ),
        (
            "single_label",
            {"calibrate": "temperature"},
            r"evaluation\.calibrate: is fitted on evaluation rows",
        ),
        (
            "single_label",
            {"tune_thresholds": {}},
            r"evaluation\.tune_thresholds: is fitted on evaluation rows",
        ),
    ],
)
def test_decisions_that_nothing_can_be_fitted_by(
    workshop: Path, case: str, evaluation: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(workshop, CASES[case], SGD, Layout(4), 2, evaluation=evaluation)


@pytest.mark.parametrize(
    ("case", "evaluation", "message"),
    [
        ("regression", {"calibrate": "temperature"}, r"evaluation\.calibrate: is for labels"),
        (
            "single_label",
            {"tune_thresholds": {"metric": "f1"}},
            "f1 is of two labels; for .* write one of macro_f1",
        ),
    ],
)
def test_what_the_rows_refuse_is_refused_before_training(
    workshop: Path, make_recipe: MakeRecipe, case: str, evaluation: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(make_recipe(case, evaluation=evaluation, run_name=f"refused-{case}"), workshop, Resume())
