"""Several tasks on one backbone: the same however rows are split, on every engine, and against single runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from objective_cases import TOLERANCE, apart, weights_apart
from rank_pool import Pools
from task_cases import NAMES, evaluations, finals, folder, task, tasks_recipe, training
from test_strategies_resume import interrupted
from tunesmith.commands.evaluate import evaluate_run
from tunesmith.commands.finished import open_run
from tunesmith.errors import UserError
from tunesmith.recipe import Recipe
from tunesmith.run import Resume, run

TOGETHER: dict[str, Any] = {"mixing": {"type": "together"}}
MIXED: dict[str, dict[str, Any]] = {
    "proportional": {},
    "temperature": {"mixing": {"type": "temperature", "temperature": 3.0}},
    "together": TOGETHER,
    "uncertainty": {**TOGETHER, "balancing": {"type": "uncertainty", "learning_rate": 0.05}},
    "gradnorm": {**TOGETHER, "balancing": {"type": "gradnorm"}},
    "dwa": {"mixing": {"type": "round_robin"}, "balancing": {"type": "dwa", "every": 3}},
}
FAST = {"proportional", "uncertainty", "gradnorm"}


def trained(made: Recipe, base: Path) -> Recipe:
    run(made, base, Resume(overwrite=True))
    return made


@pytest.fixture(scope="module")
def alone(workshop: Path) -> dict[str, Recipe]:
    """Runs of one process and one micro-batch, made where they are asked for."""
    return {}


def expected(alone: dict[str, Recipe], workshop: Path, mixed: str) -> Recipe:
    if mixed not in alone:
        made = tasks_recipe(workshop, f"tasks-{mixed}", steps=9, multitask=MIXED[mixed])
        alone[mixed] = trained(made, workshop)
    return alone[mixed]


def assert_same(found: Recipe, wanted: Recipe) -> None:
    rows, others = training(found), training(wanted)
    assert [row["units"] for row in rows] == [row["units"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert apart(row["loss"], other["loss"]) <= TOLERANCE, row["step"]
        assert apart(row["grad_norm"], other["grad_norm"]) <= TOLERANCE, row["step"]
    assert apart(evaluations(found)[-1]["eval_loss"], evaluations(wanted)[-1]["eval_loss"]) <= TOLERANCE
    mine, theirs = finals(found), finals(wanted)
    assert set(mine) == set(theirs) == set(found.tasks or ("new", "old"))
    for name in mine:
        assert max(weights_apart(mine[name], theirs[name]).values()) <= TOLERANCE, name


@pytest.mark.parametrize(
    "mixed", [one if one in FAST else pytest.param(one, marks=pytest.mark.slow) for one in MIXED]
)
def test_accumulation_changes_nothing(workshop: Path, alone: dict[str, Recipe], mixed: str) -> None:
    made = tasks_recipe(workshop, f"tasks-{mixed}-8", rows=2, steps=9, multitask=MIXED[mixed])
    assert_same(trained(made, workshop), expected(alone, workshop, mixed))


@pytest.mark.slow
@pytest.mark.parametrize("mixed", ["proportional", "uncertainty", "gradnorm"])
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_two_ranks_change_nothing(
    workshop: Path, pools: Pools, alone: dict[str, Recipe], strategy: str, mixed: str
) -> None:
    made = tasks_recipe(
        workshop,
        f"tasks-{mixed}-{strategy}",
        rows=4,
        steps=9,
        multitask=MIXED[mixed],
        parallel={"strategy": strategy},
    )
    pools[2].run(made, workshop)
    assert_same(made, expected(alone, workshop, mixed))


@pytest.mark.parametrize("mixed", ["uncertainty", pytest.param("dwa", marks=pytest.mark.slow), "gradnorm"])
def test_a_resumed_run_ends_with_the_same_bits(
    workshop: Path, alone: dict[str, Recipe], tmp_path: Path, mixed: str
) -> None:
    made = expected(alone, workshop, mixed)
    interrupted(folder(made), tmp_path / made.run_name, 3)
    again = made.model_copy(update={"output_dir": str(tmp_path)})
    run(again, workshop, Resume(resume=True))
    for name, weights in finals(again).items():
        whole = finals(made)[name]
        assert all(torch.equal(whole[key], value) for key, value in weights.items()), name


def test_weights_that_change_are_in_the_log(workshop: Path, alone: dict[str, Recipe]) -> None:
    """GradNorm's factors on the tasks' own weights begin at 1, move, and sum to the number of tasks; fixed weights are
    not repeated."""
    made = expected(alone, workshop, "gradnorm")
    own = [made.tasks[name].weight for name in NAMES]
    factors = [
        [row[f"weight/{name}"] / weight for name, weight in zip(NAMES, own, strict=True)]
        for row in training(made)
    ]
    assert factors[0] == pytest.approx([1.0] * len(NAMES))
    assert [sum(row) for row in factors] == pytest.approx([len(NAMES)] * len(factors))
    assert factors[-1] != pytest.approx(factors[0], abs=1e-4)
    fixed = training(expected(alone, workshop, "proportional"))
    assert not any(key.startswith("weight/") for row in fixed for key in row)


def test_every_task_loads_with_its_auto_class(workshop: Path, alone: dict[str, Recipe]) -> None:
    made = expected(alone, workshop, "proportional")
    classes: dict[str, Any] = {
        "tags": AutoModelForTokenClassification,
        "topic": AutoModelForSequenceClassification,
        "words": AutoModelForMaskedLM,
    }
    backbones: list[torch.Tensor] = []
    for name, auto_class in classes.items():
        model, told = auto_class.from_pretrained(folder(made) / "final" / name, output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        backbones.append(model.bert.encoder.layer[0].output.dense.weight)
    assert torch.equal(backbones[0], backbones[1])
    assert torch.equal(backbones[0], backbones[2])


def test_one_task_trains_as_it_would_alone(workshop: Path) -> None:
    """With its rows, its steps and its seed a task beside one that is evaluated only is a run of its own."""
    other = task(workshop, "single", "classification", "classification", weight=0.0)
    own = task(workshop, "tags", "tokens", "token_classification")
    several = trained(tasks_recipe(workshop, "tasks-one", tasks={"tags": own, "topic": other}), workshop)
    settings = several.view("tags").model_dump(exclude={"tasks", "multitask"})
    single = trained(Recipe.model_validate(settings | {"run_name": "tasks-none"}), workshop)
    assert [row["loss"] for row in training(several)] == [row["loss"] for row in training(single)]
    assert evaluations(several)[-1]["eval_tags_f1"] == evaluations(single)[-1]["eval_f1"]
    assert "eval_topic_accuracy" in evaluations(several)[-1]


def test_the_loss_is_the_weighted_sum(workshop: Path, alone: dict[str, Recipe]) -> None:
    made = expected(alone, workshop, "proportional")
    row = evaluations(made)[-1]
    total = row["eval_tags_loss"] + 0.5 * row["eval_topic_loss"] + row["eval_words_loss"]
    assert row["eval_loss"] == pytest.approx(total, rel=1e-9)
    tasks = [
        {key.removeprefix("loss/") for key in line if key.startswith("loss/")} for line in training(made)
    ]
    assert all(len(one) == 1 for one in tasks), "a window is of one task"
    assert set.union(*tasks) == set(NAMES)


def test_a_task_that_stopped_is_drawn_no_more(workshop: Path, tmp_path: Path) -> None:
    tasks = {
        "tags": task(workshop, "tags", "tokens", "token_classification"),
        "topic": task(
            workshop,
            "single",
            "classification",
            "classification",
            # nothing is better by a hundred: it stops at the second evaluation
            evaluation={"early_stopping": {"patience": 1, "min_delta": 100.0}},
        ),
    }
    mixing = {"mixing": {"type": "round_robin"}}
    made = trained(tasks_recipe(workshop, "tasks-stop", steps=12, tasks=tasks, multitask=mixing), workshop)
    drawn = ["loss/topic" in row for row in training(made)]
    assert drawn[:6] == [False, True] * 3
    assert not any(drawn[6:])
    interrupted(folder(made), tmp_path / made.run_name, 9)
    again = made.model_copy(update={"output_dir": str(tmp_path)})
    run(again, workshop, Resume(resume=True))
    assert ["loss/topic" in row for row in training(again)] == drawn
    whole, own = finals(made), finals(again)
    assert all(torch.equal(whole[name][key], value) for name in own for key, value in own[name].items())


def test_a_finished_run_is_a_task(workshop: Path) -> None:
    old = tasks_recipe(
        workshop, "tasks-old", tasks={"x": task(workshop, "single", "classification", "classification")}
    )
    settings = old.view("x").model_dump(exclude={"tasks", "multitask"})
    single = trained(Recipe.model_validate(settings | {"run_name": "tasks-before"}), workshop)
    tasks = {
        "before": {"run": str(folder(single)), "weight": 0.0},
        "words": task(workshop, "text", "text", "masked_lm"),
    }
    model = {"model_name_or_path": str(folder(single) / "final")}
    made = trained(
        tasks_recipe(workshop, "tasks-after", tasks=tasks, model=model, optim={"learning_rate": 1e-12}),
        workshop,
    )
    # what has hardly moved answers as it did
    before, now = evaluations(single)[-1], evaluations(made)[-1]
    assert set(finals(made)) == {"before", "words"}
    assert now["eval_before_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    assert now["eval_before_accuracy"] == before["eval_accuracy"]


@pytest.mark.parametrize("checkpoint", [None, 6])
def test_a_task_is_opened_as_a_run_of_its_own(
    workshop: Path, alone: dict[str, Recipe], checkpoint: int | None
) -> None:
    made = expected(alone, workshop, "proportional")
    row = next(row for row in evaluations(made) if row["step"] == (checkpoint or 9))
    for name in NAMES:
        opened = open_run(folder(made), checkpoint, name)
        found = evaluate_run(opened).found
        assert found.loss == pytest.approx(row[f"eval_{name}_loss"], rel=1e-6)
    with pytest.raises(UserError, match="name one of them with --task: tags, topic, words"):
        open_run(folder(made))
    with pytest.raises(UserError, match="there is none of that name"):
        open_run(folder(made), task="other")


def test_a_task_of_a_checkpoint_is_opened_with_the_average_that_was_evaluated(workshop: Path) -> None:
    averaging = {"type": "ema", "decay": 0.5, "warmup": False}
    made = trained(tasks_recipe(workshop, "tasks-ema", steps=9, averaging=averaging), workshop)
    row = next(row for row in evaluations(made) if row["step"] == 6)
    for name in NAMES:
        found = evaluate_run(open_run(folder(made), 6, name)).found
        assert found.loss == pytest.approx(row[f"eval_{name}_loss"], rel=1e-6)


def test_replayed_rows_are_a_second_task(workshop: Path) -> None:
    """Beside the same two tasks written out, with the weights of the rows' shares; what was remembered is probed with
    the head that was trained along."""
    old = tasks_recipe(
        workshop, "replay-x", tasks={"x": task(workshop, "single", "classification", "classification")}
    )
    plain = old.view("x").model_dump(mode="json", exclude={"tasks", "multitask"})
    single = trained(Recipe.model_validate(plain | {"run_name": "replay-before"}), workshop)
    words = task(workshop, "text", "text", "masked_lm")
    model = {"model_name_or_path": str(folder(single) / "final")}
    written = tasks_recipe(
        workshop,
        "replay-written",
        tasks={"new": {**words, "weight": 0.75}, "old": {"run": str(folder(single)), "weight": 0.25}},
        multitask={"mixing": {"type": "together", "rows": {"new": 12, "old": 4}, "epoch": "new"}},
        model=model,
    )
    alone = {key: value for key, value in plain.items() if key not in {"data", "objective"}}
    made = Recipe.model_validate(
        alone
        | words
        | {
            "run_name": "replay",
            "model": plain["model"] | model,
            "remember": {"run": str(folder(single)), "replay": {"ratio": 0.25}},
        }
    )
    assert_same(trained(made, workshop), trained(written, workshop))
    assert all({"loss/new", "loss/old"} <= row.keys() for row in training(made))
    # an epoch is one of the new rows, 12 of which are in a window
    epoch = made.training.model_copy(update={"max_steps": None, "num_train_epochs": 1.0})
    whole = trained(made.model_copy(update={"run_name": "replay-epoch", "training": epoch}), workshop)
    facts = json.loads((folder(whole) / "environment.json").read_text())["facts"]
    assert facts["tasks"]["new"]["windows_per_epoch"] == facts["total_steps"] == len(training(whole))
    assert facts["tasks"]["old"]["windows_per_epoch"] != facts["total_steps"]
    probed = json.loads((folder(made) / "probes.json").read_text())["old"]
    assert probed["after"]["loss"] == pytest.approx(evaluations(made)[-1]["eval_old_loss"], rel=1e-6)
    assert probed["before"]["loss"] == pytest.approx(evaluations(single)[-1]["eval_loss"], rel=1e-6)


def test_a_probe_is_of_the_backbone_that_all_tasks_make(workshop: Path) -> None:
    """Words are masked on a model without a pooler, the old topic is answered with one: the other task's."""
    old = tasks_recipe(
        workshop, "probed-x", tasks={"x": task(workshop, "single", "classification", "classification")}
    )
    plain = old.view("x").model_dump(mode="json", exclude={"tasks", "multitask"})
    single = trained(Recipe.model_validate(plain | {"run_name": "probed-before"}), workshop)
    model = {"model_name_or_path": str(folder(single) / "final")}
    remember = {"probes": {"old": {"run": str(folder(single))}}}
    words = task(workshop, "text", "text", "masked_lm")
    topic = task(workshop, "multi", "classification", "classification")
    made = {}
    for name, tasks in {"both": {"topic": topic, "words": words}, "words": {"words": words}}.items():
        recipe = tasks_recipe(workshop, f"probed-{name}", tasks=tasks, model=model, remember=remember)
        made[name] = trained(recipe, workshop)
    pooler = finals(made["both"])["topic"]["bert.pooler.dense.weight"]
    own = load_file(folder(single) / "final" / "model.safetensors")["bert.pooler.dense.weight"]
    assert not torch.equal(pooler, own)
    for one in made.values():
        probed = json.loads((folder(one) / "probes.json").read_text())["old"]
        assert probed["after"]["loss"] != probed["before"]["loss"]
