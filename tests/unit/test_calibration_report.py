"""The report's pictures of scores, its decisions, and another run beside."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.test_report import EVIL, evaluation, page, play
from tunesmith.decisions import UNDECIDED, Decisions
from tunesmith.decisions.scores import multi_label_scores, single_label_scores
from tunesmith.errors import UserError
from tunesmith.run import Resume, run
from tunesmith.tracking.events import RunEnded
from tunesmith.tracking.report import plain, write_report

NAMES = ["ham", EVIL]


def tables(
    seed: int, decisions: Decisions = UNDECIDED, labels: int = 2
) -> tuple[dict[str, float], dict[str, Any]]:
    random = np.random.default_rng(seed)
    truth = (random.random(200) < 0.2).astype(np.int64)
    logits = random.normal(size=(200, labels)) + 2 * np.eye(labels)[truth]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    names = NAMES if labels == 2 else [f"label {i}" for i in range(labels)]
    counts = {name: 100 - i for i, name in enumerate(names)}
    return single_label_scores(p, truth, names, counts, decisions)


def finished(folder: Path, seed: int, name: str) -> Path:
    folder.mkdir()
    metrics, found = tables(seed)
    play(folder, evaluation(10, "test", found, **metrics), RunEnded("done", "done", 10, {}), name=name)
    return folder


def test_a_run_shows_its_curves_and_reliability(tmp_path: Path) -> None:
    shown = page(finished(tmp_path / "a", 0, "alone"))
    assert "Precision and recall" in shown.text
    assert "Reliability" in shown.text
    assert len(re.findall(r"ECE \d", shown.text)) == 1
    assert shown.fetched == []
    assert "precision_recall" not in shown.text


def test_another_run_stands_beside(tmp_path: Path) -> None:
    """Its figures in the table of results, its F1 in that of labels, its curve in both pictures."""
    other, mine = finished(tmp_path / "plain", 1, "plain"), finished(tmp_path / "mine", 2, "mine")
    (mine / "recipe.yaml").write_text(f"run_name: mine\ntracking: {{compare_with: {other}}}\n")
    write_report(mine)
    shown = page(mine)
    assert "test, plain" in shown.text
    assert "f1, plain" in shown.text
    assert "(plain, dashed:" in shown.text
    assert len(re.findall(r"ECE \d", shown.text)) == 2
    # a circle of comparisons ends, and a folder that went away is left out
    (other / "recipe.yaml").write_text(f"run_name: plain\ntracking: {{compare_with: {mine}}}\n")
    write_report(mine)
    (mine / "recipe.yaml").write_text("run_name: mine\ntracking: {compare_with: /nowhere}\n")
    write_report(mine)
    assert "plain" not in page(mine).text


def test_decisions_are_shown_with_what_they_changed(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a", 3, "decided")
    decisions = Decisions(temperature=1.5, threshold=0.3, positive=1, metric="f1")
    metrics, found = tables(3, decisions)
    assert metrics["macro_f1"] != metrics["macro_f1_untuned"]
    assert metrics["pr_auc"] == pytest.approx(metrics["pr_auc_untuned"])
    about = {"told": [f"tune_thresholds: {EVIL}"], "eval": metrics, "tables": found}
    (folder / "decisions.json").write_text(json.dumps(plain(about)))
    write_report(folder)
    shown = page(folder)
    assert "Decided after training" in shown.text
    assert "before the temperature: ECE" in shown.text
    row = re.search(r"macro_f1 +([\d.]+) +([\d.]+)", shown.text.split("Decided after training")[1])
    assert row is not None
    assert float(row[1]) == pytest.approx(metrics["macro_f1_untuned"], abs=1e-3)
    assert float(row[2]) == pytest.approx(metrics["macro_f1"], abs=1e-3)


def test_of_many_labels_the_worst_have_curves() -> None:
    random = np.random.default_rng(0)
    truth = (random.random((100, 20)) < 0.2).astype(np.int64)
    truth[:, 7] = 0
    p = np.clip(random.random((100, 20)) * 0.5 + truth * np.linspace(0, 0.5, 20), 0, 1)
    metrics, found = multi_label_scores(p, truth, [str(i) for i in range(20)], Decisions())
    areas = [curve["area"] for curve in found["precision_recall"]]
    assert len(areas) == 8
    assert areas == sorted(areas)
    assert metrics["pr_auc"] > max(areas[:4])
    assert "7" not in [curve["name"] for curve in found["precision_recall"]]


def test_of_two_labels_the_rarer_training_label_is_looked_for() -> None:
    truth = np.array([0, 1, 1, 1])
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]])
    for counts, looked_for in (({"a": 1, "b": 9}, "a"), ({"a": 9, "b": 1}, "b"), ({"a": 5, "b": 5}, "b")):
        metrics, found = single_label_scores(p, truth, ["a", "b"], counts, Decisions())
        assert [curve["name"] for curve in found["precision_recall"]] == [looked_for]
        assert metrics["pr_auc"] == found["precision_recall"][0]["area"]


def test_a_run_to_compare_with_must_be_there(workshop: Path, make_recipe: Any) -> None:
    made = make_recipe(
        "single_label", tracking={"compare_with": str(workshop / "no-run")}, run_name="beside-none"
    )
    with pytest.raises(UserError, match=r"tracking\.compare_with: .*no-run holds no run"):
        run(made, workshop, Resume())
