"""Every loss in whole runs: what it trains does not hang on micro-batches, accumulation or ranks, and a run that goes
on ends with the same bits."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from objective_cases import (
    ACCUMULATED,
    ADAMW,
    CASES,
    RANKS,
    SGD,
    SHARDED,
    TWO,
    WHOLE,
    Layout,
    Run,
    assert_same_curves,
    assert_same_weights,
    recipe,
)
from rank_pool import Pools
from tiny_data import write
from tunesmith.run import Resume, run

FUNCTIONS = """
import torch

def hinge(logits, labels, margin=1.0):
    own = logits.gather(-1, labels[:, None])
    over = (logits - own + margin).clamp_min(0.0)
    return over.sum(-1) - margin

def squares(logits, labels, mask, power=2):
    assert mask.dtype is torch.bool
    return ((logits - labels).abs() ** power).sum(-1)

def far(logits, labels):
    return -torch.log_softmax(logits / 2, -1).gather(-1, labels[:, None])[:, 0]
"""

LOSSES: dict[str, tuple[str, Any]] = {
    "weights": ("single_label", {"type": "cross_entropy", "class_weights": "auto"}),
    "weights by name": (
        "single_label", {"type": "cross_entropy", "class_weights": {"a": 1, "b": 0.5, "c": 2, "d": 0}},
    ),
    "one against the rest": ("single_label", {"type": "binary_cross_entropy", "pos_weight": "auto"}),
    "focal": ("single_label", {"type": "focal", "gamma": 1.5, "alpha": "auto"}),
    "class balanced": ("single_label", {"type": "class_balanced"}),
    "class balanced focal": ("single_label", {"type": "class_balanced", "base": "focal", "gamma": 1}),
    "class balanced sigmoid": ("single_label", {"type": "class_balanced", "base": "binary_cross_entropy"}),
    "ldam": ("single_label", {"type": "ldam", "scale": 2, "reweight_from": 6, "beta": 0.99}),
    "cumulative": ("single_label", "ordinal"),
    "emd": ("single_label", {"type": "ordinal", "method": "emd"}),
    "corn": ("single_label", {"type": "ordinal", "method": "corn"}),
    "hinge": ("single_label", {"type": "function", "function": "FILE:hinge", "options": {"margin": 0.5}}),
    "pairs": ("pairs", {"type": "focal", "alpha": 0.25}),
    "several": ("multi_label", {"type": "binary_cross_entropy", "pos_weight": "auto", "class_weights": [1, 2, 3]}),
    "sigmoid focal": ("multi_label", {"type": "focal", "alpha": "auto"}),
    "several balanced": ("multi_label", {"type": "class_balanced", "base": "focal", "beta": 0.9}),
    "several squares": ("multi_label", {"type": "function", "function": "FILE:squares"}),
    "absolute": ("regression", "mean_absolute_error"),
    "huber": ("regression", {"type": "huber", "delta": 0.5}),
    "tag weights": ("token_classification", {"type": "cross_entropy", "class_weights": "auto"}),
    "tag sigmoid": ("token_classification", "binary_cross_entropy"),
    "tag focal": ("token_classification", {"type": "focal", "gamma": 0.5}),
    "tag ldam": ("token_classification", {"type": "ldam", "reweight_from": 0.5}),
    "dice": ("token_classification", "dice"),
    "answers": ("question_answering", "focal"),
    "sft": ("sft", "focal"),
    "decoder": ("causal_lm_gpt2", {"type": "function", "function": "FILE:far"}),
    "masked": ("masked_lm", "focal"),
    "next sentence": ("next_sentence", "focal"),
    "seq2seq": ("seq2seq_t5", "focal"),
    "spans": ("span_corruption", "focal"),
    "soft": ("soft", None),
    "soft weights": ("soft", {"type": "cross_entropy", "class_weights": "auto"}),
    "soft sigmoid": ("soft", {"type": "binary_cross_entropy", "pos_weight": [1, 2, 3, 4]}),
    **{name: ("lists", {"type": "ranking", "method": name}) for name in ("ranknet", "margin", "listnet", "listmle")},
}  # fmt: skip
FAST = ["weights", "ldam", "corn", "sigmoid focal", "dice", "sft", "soft", "listmle"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LOSSES if name not in FAST]


def soft(dice: random.Random) -> dict[str, Any]:
    shares = [dice.random() for _ in "abcd"]
    shares = [round(share / sum(shares), 6) for share in shares]
    return {
        "text": " ".join(dice.choices(["amber", "river", "stone"], k=dice.randint(1, 9))),
        "votes": dict(zip("abcd", shares, strict=True)) if dice.random() < 0.5 else shares,
    }


def lists(dice: random.Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for query in range(23):
        for _ in range(dice.choice([2, 3, 7])):
            text = " ".join(dice.choices(["copper", "field", "harbor"], k=dice.randint(1, 9)))
            rows.append({"text": text, "label": dice.choice([0.0, 1.0, 2.5]), "query": query})
    dice.shuffle(rows)
    return rows


@pytest.fixture(scope="session")
def sections(workshop: Path) -> dict[str, dict[str, Any]]:
    """The sections of a recipe for each loss."""
    dice = random.Random(5)
    write(workshop / "data" / "soft.jsonl", [soft(dice) for _ in range(41)])
    write(workshop / "data" / "lists.jsonl", lists(dice))
    (workshop / "losses.py").write_text(FUNCTIONS)
    made: dict[str, dict[str, Any]] = {}
    for name, (case, loss) in LOSSES.items():
        if isinstance(loss, dict) and "function" in loss:
            loss = {**loss, "function": loss["function"].replace("FILE", str(workshop / "losses.py"))}
        made[name] = {"objective": {"loss": loss}}
        if name == "corn":  # whose head has an output less
            made[name]["model"] = {"model_name_or_path": str(workshop / "models" / "bert_mlm")}
        if case in {"soft", "lists"}:
            columns = {"soft_labels": "votes"} if case == "soft" else {"group": "query"}
            path = str(workshop / "data" / f"{case}.jsonl")
            made[name]["data"] = {"train": [{"path": path, "format": "classification", "columns": columns}]}
        if case == "soft":
            made[name]["objective"]["labels"] = ["a", "b", "c", "d"]
    return made


def case_of(name: str) -> str:
    return {"soft": "single_label", "lists": "regression"}.get(LOSSES[name][0], LOSSES[name][0])


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_a_loss_does_not_see_micro_batches_and_ranks(
    train: Run, sections: dict[str, dict[str, Any]], name: str
) -> None:
    whole, *others = (
        train(case_of(name), SGD, layout, 10, **sections[name]) for layout in (WHOLE, ACCUMULATED, RANKS)
    )
    assert others[1].facts["world_size"] == 2
    assert whole.facts["loss"]["type"] if LOSSES[name][1] else "loss" not in whole.facts
    assert whole.curve("loss")[0] != whole.curve("loss")[-1]
    for other in others:
        assert_same_curves(other, whole)
        assert_same_weights(other, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_a_loss_does_not_see_the_engine(
    train: Run, sections: dict[str, dict[str, Any]], name: str, strategy: str
) -> None:
    one = train(case_of(name), SGD, WHOLE, 10, **sections[name])
    two = train(case_of(name), SGD, TWO, 10, **sections[name], parallel=SHARDED[strategy])
    assert_same_curves(two, one)
    assert_same_weights(two, one)


def test_weights_come_when_they_are_deferred_to(train: Run, sections: dict[str, dict[str, Any]]) -> None:
    """Until then it is the loss without them, and the log says which counts."""
    objective = {"loss": {"type": "ldam", "scale": 2}}
    without = train("single_label", SGD, WHOLE, 10, objective=objective)
    deferred = train("single_label", SGD, WHOLE, 10, **sections["ldam"])
    assert deferred.curve("loss")[:6] == pytest.approx(without.curve("loss")[:6], rel=1e-6)
    assert deferred.curve("loss")[6] != pytest.approx(without.curve("loss")[6], rel=1e-3)
    for step, row in enumerate(deferred.rows):
        assert row["loss"] == pytest.approx(row["loss/loss" if step < 6 else "loss/reweighted"])
    assert any("from step 7 on" in note for note in deferred.facts["notes"])


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["ldam", pytest.param("listmle", marks=pytest.mark.slow), "hinge", "soft"])
def test_a_run_that_goes_on_ends_with_the_same_bits(
    workshop: Path, pools: Pools, sections: dict[str, dict[str, Any]], name: str, world_size: int
) -> None:
    """Stopped before the weights come, where they do."""

    def steps(stop: int, run_name: str, how: Resume) -> Path:
        made = recipe(
            workshop, CASES[case_of(name)], ADAMW, Layout(4, world_size), 10, **sections[name],
            schedule={"lr_scheduler_type": "constant"}, checkpoint={"save_steps": 4, "save_total_limit": None},
        ).model_copy(update={"run_name": run_name})  # fmt: skip
        if world_size == 1:
            run(made, workshop, how)
        else:
            pools[world_size].run(made, workshop, how)
        return workshop / "runs" / run_name

    label = f"{name}-{world_size}".replace(" ", "-")
    whole = steps(10, f"whole-{label}", Resume())
    again = workshop / "runs" / f"again-{label}"
    _stopped(whole, again, 4)
    steps(10, again.name, Resume(resume=True))
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (whole, again))
    assert all(tensor.equal(b[key]) for key, tensor in a.items())


def _stopped(run_dir: Path, copy: Path, step: int) -> None:
    shutil.copytree(run_dir, copy)
    for path in copy.glob("checkpoint-*"):
        if int(path.name[11:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(copy / "final")
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    kept = [json.dumps(row) for row in rows if row["step"] <= step]
    (copy / "metrics.jsonl").write_text("\n".join(kept) + "\n")
