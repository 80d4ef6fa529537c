"""`tunesmith evaluate` gives the numbers that the run gave."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.commands.evaluate import evaluate_run
from tunesmith.commands.finished import open_run
from tunesmith.errors import UserError
from tunesmith.tracking.metrics_file import read

CASES = (
    "single_label", "pairs", "multi_label", "regression", "token_classification", "question_answering",
    "seq2seq_t5", "seq2seq_bart", "sft", "causal_lm", "causal_lm_gpt2", "masked_lm", "next_sentence",
    "span_corruption",
)  # fmt: skip
Trained = Callable[[str], Path]


def numbers(run_dir: Path, split: str, step: int) -> dict[str, float]:
    """What the run's metrics.jsonl says."""
    (row,) = [
        row for row in read(run_dir / "metrics.jsonl") if f"{split}_loss" in row and row["step"] == step
    ]
    return {
        key.removeprefix(f"{split}_"): value
        for key, value in row.items()
        if key.startswith(f"{split}_") and key != f"{split}_seconds"
    }


@pytest.mark.parametrize("case", CASES)
def test_the_test_rows_give_what_the_run_printed(trained: Trained, case: str) -> None:
    run_dir = trained(case)
    found = evaluate_run(open_run(run_dir), "test")
    printed = numbers(run_dir, "test", 2)
    assert found.found.metrics.keys() == printed.keys()
    assert found.found.metrics == pytest.approx(printed, abs=1e-6)
    assert found.in_the_run["loss"] == printed["loss"]
    written = json.loads((run_dir / "evaluation-test.json").read_text(encoding="utf-8"))
    assert written["metrics"] == pytest.approx(printed, abs=1e-6)
    assert (written["weights"], written["rows"]) == ("final", found.rows)


def test_a_checkpoint_gives_the_evaluation_of_its_step(trained: Trained) -> None:
    run_dir = trained("single_label")
    first, last = (evaluate_run(open_run(run_dir, step)) for step in (1, 2))
    assert first.found.metrics == pytest.approx(numbers(run_dir, "eval", 1), abs=1e-6)
    assert last.found.metrics == pytest.approx(numbers(run_dir, "eval", 2), abs=1e-6)
    assert first.found.loss != last.found.loss
    assert first.in_the_run == {**numbers(run_dir, "eval", 1), "seconds": first.in_the_run["seconds"]}
    assert first.path.name == "evaluation-eval-checkpoint-1.json"


def test_a_checkpoint_of_a_run_that_never_ended(trained: Trained, tmp_path: Path) -> None:
    run_dir = tmp_path / "single_label"
    shutil.copytree(trained("single_label"), run_dir)
    shutil.rmtree(run_dir / "final")
    with pytest.raises(UserError, match=r"no final/.*--checkpoint 1, 2"):
        open_run(run_dir)
    found = evaluate_run(open_run(run_dir, 1))
    assert found.found.metrics == pytest.approx(numbers(run_dir, "eval", 1), abs=1e-6)


def test_files_are_read_in_the_format_of_the_training_rows(trained: Trained, tmp_path: Path) -> None:
    run = open_run(trained("single_label"))
    path = tmp_path / "new.csv"
    path.write_text("text,label\nred river a,a\n,b\nblue stone b,b\n", encoding="utf-8")
    found = evaluate_run(run, data=[str(path)])
    assert (found.rows, found.dropped, found.path.name) == (2, {"empty text": 1}, "evaluation-new.json")
    assert found.in_the_run == {}
    assert [row["metric"] for row in found.table()][:2] == ["loss", "accuracy"]


def test_a_label_that_the_training_did_not_have(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "new.jsonl"
    path.write_text('{"text": "red", "label": "zebra"}\n', encoding="utf-8")
    with pytest.raises(
        UserError, match=r"new\.jsonl:1: label: label 'zebra' is not among the training labels"
    ):
        evaluate_run(open_run(trained("single_label")), data=[str(path)])


def test_what_is_asked_for_must_be_there(trained: Trained, tmp_path: Path) -> None:
    run_dir = trained("single_label")
    with pytest.raises(UserError, match=r"not the folder of a run.*did you mean"):
        open_run(run_dir / "final")
    with pytest.raises(UserError, match="has no checkpoint-7"):
        open_run(run_dir, 7)
    with pytest.raises(UserError, match="exclude each other"):
        evaluate_run(open_run(run_dir), "test", ["rows.csv"])
    damaged = tmp_path / "run"
    shutil.copytree(run_dir, damaged)
    (damaged / "checkpoint-1" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint-1 is broken: weights\.safetensors"):
        open_run(damaged, 1)
    (damaged / "objective.json").unlink()
    with pytest.raises(UserError, match=r"objective\.json is missing"):
        open_run(damaged)


def test_the_labels_are_those_of_the_run_whatever_the_files_say_now(trained: Trained, tmp_path: Path) -> None:
    """A class that is gone from the training file does not move the others."""
    run_dir = tmp_path / "single_label"
    shutil.copytree(trained("single_label"), run_dir)
    changed = tmp_path / "changed.jsonl"
    rows = [{"text": "river a", "label": "a"}, {"text": "stone c", "label": "c"}] * 10
    changed.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    saved = run_dir / "recipe.yaml"
    before = saved.read_text(encoding="utf-8")
    saved.write_text(re.sub(r"path: \S+single\.jsonl", f"path: {changed}", before), encoding="utf-8")
    run = open_run(run_dir)
    assert run.recipe.data.train[0].path == str(changed)
    evaluate_run(run)
    written = json.loads((run_dir / "evaluation-eval.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in written["tables"]["labels"]["classes"]] == ["a", "b", "c", "d"]
