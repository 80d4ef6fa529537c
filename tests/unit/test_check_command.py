"""`tunesmith check` names what is wrong, where, and with which exit code; and finds nothing wrong where nothing is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.commands import check_model
from tunesmith.commands.check import check
from tunesmith.commands.check_data import end_marker, spread
from tunesmith.commands.findings import Finding, exit_code
from tunesmith.data.order import Segment
from tunesmith.data.prepare import Dataset
from tunesmith.data.table import Table, finish_table, write_table
from tunesmith.objectives import build_objective
from tunesmith.objectives.sft import SFTObjective
from tunesmith.recipe import Recipe
from tunesmith.tokenizer import tokenizer_for

MakeRecipe = Callable[..., Recipe]
EVERY = (
    "single_label", "pairs", "multi_label", "regression", "token_classification", "question_answering",
    "seq2seq_t5", "seq2seq_bart", "sft", "causal_lm", "causal_lm_gpt2", "masked_lm", "next_sentence",
    "span_corruption",
)  # fmt: skip


@pytest.fixture
def found(tmp_path: Path) -> Callable[[Recipe], list[Finding]]:
    def run(recipe: Recipe) -> list[Finding]:
        return list(check(recipe.model_copy(update={"output_dir": str(tmp_path / "runs")}), tmp_path))

    return run


def errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "error"]


def text(findings: list[Finding], topic: str, level: str = "fine") -> str:
    return "\n".join(one.text for one in findings if (one.topic, one.level) == (topic, level))


def rows(path: Path, given: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return {"path": str(path), "format": "classification"}


def labelled(words: str, label: str) -> list[dict[str, Any]]:
    return [{"text": word, "label": label} for word in words.split()]


@pytest.mark.parametrize("case", EVERY)
def test_a_sound_recipe_has_no_errors(make_recipe: MakeRecipe, found: Any, case: str) -> None:
    findings = found(make_recipe(case))
    assert errors(findings) == []
    assert exit_code(findings) == 0
    assert "the longest batch" in text(findings, "memory")
    assert "for 2 steps" in text(findings, "time")
    assert "measures loss" in text(findings, "evaluation")


def test_what_computes_the_loss_is_told_and_measured(make_recipe: MakeRecipe, found: Any) -> None:
    """A check that made whole logits would refuse runs for want of memory that they do not take."""
    assert text(found(make_recipe("causal_lm")), "kernels").startswith("linear_cross_entropy: cpu: ")
    told = text(found(make_recipe("causal_lm", kernels="reference")), "kernels")
    assert told == "linear_cross_entropy: reference: the recipe asks for it"


def test_packing_is_tried(make_recipe: MakeRecipe, found: Any) -> None:
    findings = found(make_recipe("causal_lm", data={"packing": True, "group_by_length": False}))
    assert errors(findings) == []
    assert "packed rows do not see each other" in text(findings, "packing")


def test_nothing_but_the_cache_is_written(make_recipe: MakeRecipe, found: Any, tmp_path: Path) -> None:
    found(make_recipe("single_label"))
    assert list(tmp_path.iterdir()) == []


def test_every_source_with_a_fault_is_named(make_recipe: MakeRecipe, found: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": \n', encoding="utf-8")
    bad = {"path": str(tmp_path / "bad.jsonl"), "format": "classification"}
    gone = {"path": str(tmp_path / "gone.jsonl"), "format": "classification"}
    good = rows(tmp_path / "good.jsonl", labelled("a b", "x") + labelled("c d", "y"))
    recipe = make_recipe("single_label", data={"split": None, "train": [bad], "eval": [gone], "test": [good]})
    findings = found(recipe)
    said = "\n".join(one.text for one in errors(findings))
    assert "bad.jsonl:2" in said
    assert "gone.jsonl: no such file" in said
    assert "4 rows can be read" in text(findings, "test")
    assert exit_code(findings) == 2


def test_a_class_that_only_eval_has_is_an_error_with_its_place(
    make_recipe: MakeRecipe, found: Any, tmp_path: Path
) -> None:
    train = rows(tmp_path / "train.jsonl", labelled("a b", "x") + labelled("c d", "y"))
    other = rows(tmp_path / "eval.jsonl", labelled("e", "x") + labelled("f", "zebra"))
    findings = found(make_recipe("single_label", data={"split": None, "train": [train], "eval": [other]}))
    (one,) = errors(findings)
    assert "eval.jsonl:2: label: label 'zebra'" in one.text
    assert one.exit_code == 2


def test_counts_rare_classes_drops_cuts_and_leaks(
    make_recipe: MakeRecipe, found: Any, tmp_path: Path
) -> None:
    train = labelled("a b c", "x") + labelled("d", "y") + [{"text": " ", "label": "x"}]
    train.append({"text": "river " * 300, "label": "x"})
    sources = {
        "train": [rows(tmp_path / "train.jsonl", train)],
        "eval": [rows(tmp_path / "eval.jsonl", labelled("c e b", "x"))],
        "test": [rows(tmp_path / "test.jsonl", labelled("e g", "x"))],
    }
    findings = found(make_recipe("single_label", data={"split": None, **sources}))
    assert "5 rows of 6 examples from 1 source" in text(findings, "train")
    assert "2 labels: x 4, y 1" in text(findings, "train")
    warned = text(findings, "train", "warning")
    assert "1 labels with fewer than 2 rows: y" in warned
    assert f"1 dropped: empty text (such as {tmp_path}/train.jsonl:5)" in warned
    assert "1 rows (20.0%) are cut to max_length 64" in warned
    assert "5 rows are less than one batch of 16" in warned
    leaks = text(findings, "eval", "warning")
    assert "2 of 3 inputs (66.7%) are also in train" in leaks
    assert f"{tmp_path}/eval.jsonl:1 is {tmp_path}/train.jsonl:3" in leaks
    assert "no row with y" in leaks
    assert "no input is also in train" in text(findings, "test")
    assert "1 of 2 inputs (50.0%) are also in eval" in text(findings, "test", "warning")


def test_rows_longer_than_the_model_are_an_error_not_a_crash(make_recipe: MakeRecipe, found: Any) -> None:
    findings = found(make_recipe("causal_lm_gpt2", data={"max_length": 400}))
    (one,) = errors(findings)
    assert "the model 160 positions" in one.text
    assert one.fix == "set data.max_length: 160"
    assert text(findings, "memory") == ""
    rotary = found(make_recipe("causal_lm", data={"max_length": 400}))
    assert errors(rotary) == []
    assert "beyond these it was not trained" in text(rotary, "model", "warning")


def test_metrics_that_are_not_measured(make_recipe: MakeRecipe, found: Any) -> None:
    evaluation = {"metrics": ["accuracy", "macro_f2"], "metric_for_best": "accuracy"}
    findings = found(make_recipe("single_label", evaluation=evaluation))
    (one,) = errors(findings)
    assert "evaluation.metrics: macro_f2 is not measured" in one.text
    assert one.fix == "did you mean macro_f1?"


def test_a_model_that_does_not_fit_its_tokenizer(make_recipe: MakeRecipe, found: Any, workshop: Path) -> None:
    recipe = make_recipe("single_label", model={"tokenizer": str(workshop / "models" / "llama")})
    (one,) = errors(found(recipe))
    assert "they do not belong together" in one.text


def test_memory_that_is_not_there(
    make_recipe: MakeRecipe, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_model, "free_memory_bytes", lambda _: 1000)
    findings = found(make_recipe("single_label"))
    (one,) = errors(findings)
    assert "gradients and optimizer state need" in one.text
    assert exit_code(findings) == 3
    assert text(findings, "memory") == ""  # nothing was computed


def test_a_disk_that_is_too_small(
    make_recipe: MakeRecipe, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW: weights and twice as much state, three checkpoints at most and final/."""
    recipe = make_recipe("single_label", checkpoint={"save_steps": 1, "save_total_limit": 1, "final": "last"})
    (line,) = [one for one in found(recipe) if one.topic == "disk"]
    assert "(2 × " in line.text
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    findings = found(recipe)
    (one,) = errors(findings)
    assert one.topic == "disk"
    assert exit_code(findings) == 3


def test_the_users_faults_come_before_the_machines() -> None:
    findings = [
        Finding("error", "disk", "", "", 3),
        Finding("warning", "train", ""),
        Finding("error", "", "", "", 2),
    ]
    assert exit_code(findings) == 2
    assert exit_code(findings[:2]) == 3
    assert exit_code(findings[1:2]) == 0


def test_the_output_folder(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("single_label")

    def first(output_dir: Path) -> Finding:
        return next(check(recipe.model_copy(update={"output_dir": str(output_dir)}), tmp_path))

    assert first(tmp_path / "new").level == "fine"
    (tmp_path / "used" / "single_label" / "checkpoint-1").mkdir(parents=True)
    assert "holds a run" in first(tmp_path / "used").text
    (tmp_path / "file").touch()
    assert first(tmp_path / "file").exit_code == 2


def test_the_precision_that_the_device_emulates(
    make_recipe: MakeRecipe, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.precision.native_bf16", lambda _: False)
    findings = found(make_recipe("single_label", training={"precision": "bf16"}))
    assert "slower than fp32" in text(findings, "device", "warning")


def test_the_chat_template_and_its_end(make_recipe: MakeRecipe, found: Any) -> None:
    findings = found(make_recipe("sft"))
    assert "<|im_end|>" in text(findings, "chat")
    assert "ends with a marker that is learnt (<|im_end|>)" in text(findings, "train")
    assert "label positions are trained" in text(findings, "train")


@pytest.mark.parametrize(("ended", "level"), [(4, "fine"), (2, "warning"), (0, "error")])
def test_an_end_marker_that_is_not_learnt(
    make_recipe: MakeRecipe, tmp_path: Path, ended: int, level: str
) -> None:
    recipe = make_recipe("sft")
    tokenizer, _ = tokenizer_for(recipe, tmp_path)
    objective = build_objective(recipe, tokenizer)
    assert isinstance(objective, SFTObjective)
    marker = tokenizer.convert_tokens_to_ids("<|im_end|>")
    # an end that is learnt in an earlier turn is not one of the last
    unended = [20, marker, 22, 22, 22, 22, 22]
    given = [[20, 21, marker] if i < ended else unended for i in range(4)]
    made = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in given]
    finish_table(tmp_path / "t", write_table(tmp_path / "t", made), {})
    table = Table(tmp_path / "t")
    assert end_marker(Dataset("train", table, (Segment(0, 4),)), objective).level == level


def test_looked_at_rows_are_spread() -> None:
    assert spread(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert spread(101, 3).tolist() == [0, 50, 100]
    assert spread(1, 4).tolist() == [0]


def test_strategies_are_rehearsed(make_recipe: MakeRecipe, found: Any) -> None:
    """What a strategy computes in every step is computed, its average counted on the disk."""
    saves = {"save_steps": 1, "save_total_limit": 1, "final": "last"}
    plain = found(make_recipe("single_label", checkpoint=saves))
    findings = found(
        make_recipe(
            "single_label",
            checkpoint=saves,
            regularization={"l2": 0.01, "sharpness": {"type": "sam", "rho": 0.05}},
            averaging={"type": "ema", "decay": 0.5},
            remember={"l2_sp": {"weight": 0.1}},
        )
    )
    assert errors(findings) == []
    assert text(findings, "strategies") == "in every step: l2, sharpness, l2_sp, averaging"
    assert text(plain, "strategies") == ""
    assert text(findings, "disk") != text(plain, "disk")


def test_a_strategy_that_cannot_be_built_is_an_error(
    make_recipe: MakeRecipe, found: Any, tmp_path: Path
) -> None:
    gone = tmp_path / "no_run"
    (one,) = errors(found(make_recipe("single_label", remember={"probes": {"old": {"run": str(gone)}}})))
    assert (one.topic, one.text.startswith("remember.probes.old: ")) == ("strategies", True)
