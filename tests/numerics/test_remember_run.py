"""A run that remembers another: the old head's answers are kept to (learning without forgetting), and the old rows are
evaluated before and after."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from objective_cases import (
    ACCUMULATED,
    ADAMW,
    CASES,
    SGD,
    SHARDED,
    TWO,
    WHOLE,
    Run,
    apart,
    assert_same_curves,
    assert_same_weights,
    open_rows,
    recipe,
    weights_apart,
)
from rank_pool import Pools
from test_plain_loop import inputs, several_labels
from test_strategies_resume import interrupted
from tunesmith.commands.finished import open_run
from tunesmith.errors import UserError
from tunesmith.run import Resume, run

ENGINES = {"ddp": {"strategy": "ddp"}, **SHARDED}
FAST = {**SGD, "optim": {**SGD["optim"], "learning_rate": 0.2}}
STEPS, WEIGHT, TEMPERATURE = 8, 2.0, 1.5


@pytest.fixture(scope="module")
def old(workshop: Path) -> Path:
    """A finished run on four classes, with rows kept for evaluation."""
    made = recipe(
        workshop, CASES["single_label"], ADAMW, WHOLE, 10, run_name="remembered",
        data={"eval": [{"path": str(workshop / "data" / "single.jsonl"), "format": "classification"}]},
    )  # fmt: skip
    run(made, workshop, Resume(overwrite=True))
    return workshop / "runs" / "remembered"


def sections(old: Path, **parts: Any) -> dict[str, Any]:
    return {
        "model": {"model_name_or_path": str(old / "final")},
        "remember": {"run": str(old), **parts},
    }


def lwf(old: Path) -> dict[str, Any]:
    return sections(old, lwf={"weight": WEIGHT, "temperature": TEMPERATURE})


def test_lwf_by_hand(train: Run, workshop: Path, old: Path) -> None:
    """Beside a plain loop: the loss of the new rows, and T² × KL of the old model's answers from the old head's on the
    trained backbone. Its head is trained too."""
    case = CASES["multi_label"]
    found = train("multi_label", FAST, WHOLE, STEPS, **lwf(old))
    still = {**SGD, "optim": {**SGD["optim"], "learning_rate": 0.0}}
    start = train("multi_label", still, WHOLE, 1, **lwf(old)).weights

    teacher = AutoModelForSequenceClassification.from_pretrained(old / "final").eval()
    model = AutoModelForSequenceClassification.from_pretrained(
        old / "final", num_labels=3, problem_type="multi_label_classification", ignore_mismatched_sizes=True
    )
    model.load_state_dict(start)
    head = copy.deepcopy(teacher.classifier)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.2)
    rows = open_rows(recipe(workshop, case, SGD, WHOLE, STEPS), workshop)
    losses: list[float] = []
    kept: list[float] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = rows(step)
        task = several_labels(model, batch)
        with torch.no_grad():
            answers = (teacher(**inputs(batch)).logits / TEMPERATURE).log_softmax(-1)
        own = (head(model.bert(**inputs(batch)).pooler_output) / TEMPERATURE).log_softmax(-1)
        keep = TEMPERATURE**2 * F.kl_div(own, answers, log_target=True, reduction="sum") / len(batch)
        (task + WEIGHT * keep).backward()
        optimizer.step()
        losses.append((task + WEIGHT * keep).item())
        kept.append(keep.item())
    assert max(apart(a, b) for a, b in zip(found.curve("loss"), losses, strict=True)) < 1e-5
    assert abs(found.curve("loss/lwf")[0]) < 1e-6
    assert kept[-1] > 1e-5
    assert max(apart(a, b) for a, b in zip(found.curve("loss/lwf")[2:], kept[2:], strict=True)) < 1e-3
    expected = {name: model.state_dict()[name] for name in found.weights}
    assert max(weights_apart(found.weights, expected).values()) < 1e-5
    saved = load_file(found.run_dir / "old" / "head.safetensors")
    torch.testing.assert_close(saved["classifier.weight"], head.weight.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", ["accumulated", *ENGINES])
def test_lwf_is_the_same_everywhere(train: Run, old: Path, strategy: str) -> None:
    one = train("multi_label", SGD, WHOLE, STEPS, **lwf(old))
    if strategy == "accumulated":
        other = train("multi_label", SGD, ACCUMULATED, STEPS, **lwf(old))
    else:
        other = train("multi_label", SGD, TWO, STEPS, parallel=ENGINES[strategy], **lwf(old))
    assert_same_curves(other, one)
    assert_same_weights(other, one)


@pytest.mark.parametrize("strategy", ["zero2", "fsdp2"])
def test_lwf_resumes_with_the_same_bits(
    workshop: Path, pools: Pools, old: Path, tmp_path: Path, strategy: str
) -> None:
    made = recipe(
        workshop, CASES["multi_label"], ADAMW, TWO, 6, parallel=ENGINES[strategy], run_name=f"lwf-{strategy}",
        checkpoint={"save_steps": 3, "save_total_limit": None, "final": "last"}, **lwf(old),
    )  # fmt: skip
    pools[2].run(made, workshop)
    whole = workshop / "runs" / made.run_name
    interrupted(whole, tmp_path / made.run_name, 3)
    pools[2].run(made.model_copy(update={"output_dir": str(tmp_path)}), workshop, Resume(resume=True))
    for path in ("final/model.safetensors", "old/head.safetensors"):
        expected, found = load_file(whole / path), load_file(tmp_path / made.run_name / path)
        assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("strategy", ["single", "zero3"])
def test_a_probe_has_the_old_runs_own_figures(workshop: Path, pools: Pools, old: Path, strategy: str) -> None:
    """Before: what the old run said of itself at its end. After: with a learning rate of 0 the same; else those of the
    old head on the new backbone."""
    layout, parallel = (WHOLE, {}) if strategy == "single" else (TWO, {"parallel": ENGINES[strategy]})
    for rate in (0.0, 0.5):
        settings = {**SGD, "optim": {**SGD["optim"], "learning_rate": rate}}
        name = f"probe-{strategy}-{rate}"
        made = recipe(
            workshop, CASES["multi_label"], settings, layout, 4, run_name=name, **sections(old), **parallel
        )
        if strategy == "single":
            run(made, workshop, Resume(overwrite=True))
        else:
            pools[2].run(made, workshop)
        probed = probes(workshop / "runs" / name)["old"]
        own = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
        last = next(row for row in reversed(own) if "eval_loss" in row)
        assert probed["before"]["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
        assert probed["before"]["accuracy"] == last["eval_accuracy"]
        assert "Remembered" in (workshop / "runs" / name / "report.html").read_text(encoding="utf-8")
        if rate == 0.0:
            assert probed["after"] == probed["before"]
        else:
            new = open_run(workshop / "runs" / name).model.bert.state_dict()
            reference = AutoModelForSequenceClassification.from_pretrained(old / "final").eval()
            reference.bert.load_state_dict(new)
            made_old = open_run(old)
            rows = [made_old.objective.tokenizer(text)["input_ids"] for text, _ in texts(workshop)]
            labels = [made_old.objective.labels.index(label) for _, label in texts(workshop)]  # type: ignore[attr-defined]
            losses = [
                F.cross_entropy(reference(torch.tensor([row])).logits, torch.tensor([label])).item()
                for row, label in zip(rows, labels, strict=True)
            ]
            assert probed["after"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
            assert probed["after"]["loss"] != pytest.approx(probed["before"]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"model_name_or_path": "linked"}}, "is not what the run begins with"),
        ({"model": {"config": {"num_hidden_layers": 1}}}, "remember.run: another backbone than that of "),
        (
            {"model": {"config": {"num_hidden_layers": 1}}, "remember": {"run": None, "probes": {"x": {"run": "old"}}}},
            "remember.probes.x: another backbone than that of ",
        ),
        ({"remember": {"run": "nowhere"}, "model": {"model_name_or_path": "nowhere/final"}}, "nowhere"),
        ({"remember": {"probes": {"old": {"run": "old", "split": "test"}}}}, "probes.old: the run has no test rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_remembered_is_told_before_the_training(
    workshop: Path, old: Path, tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    for name in ("old", "linked"):
        shutil.copytree(old, tmp_path / name, dirs_exist_ok=True)
    model = {"model_name_or_path": "old/final", **sections.get("model", {})}
    remember = {"run": "old", **sections.get("remember", {})}
    if model["model_name_or_path"] == "linked":  # another folder by its content only
        (tmp_path / "linked" / "final").rename(tmp_path / "linked" / "weights")
        model["model_name_or_path"] = str(tmp_path / "linked" / "weights")
    made = recipe(
        workshop, CASES["multi_label"], SGD, WHOLE, 1, model=model, remember=remember, run_name="unremembered"
    ).model_copy(update={"output_dir": str(tmp_path / "runs")})  # fmt: skip
    with pytest.raises(UserError, match=re.escape(said)):
        run(made, tmp_path, Resume())
    assert not (tmp_path / "runs" / "unremembered" / "metrics.jsonl").exists()


def texts(workshop: Path) -> list[tuple[str, str]]:
    lines = (workshop / "data" / "single.jsonl").read_text().splitlines()
    return [(row["text"], row["label"]) for row in map(json.loads, lines)]


def probes(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "probes.json").read_text())


def test_spans_have_two_outputs_whatever_the_head_before_was_for(train: Run, old: Path) -> None:
    found = train("question_answering", SGD, WHOLE, 1, model={"model_name_or_path": str(old / "final")})
    assert found.weights["qa_outputs.weight"].shape[0] == 2
