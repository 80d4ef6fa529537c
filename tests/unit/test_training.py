"""What a run does beside its steps: evaluations, the best checkpoint, early stopping, freezing, precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import assert_same_bits, final_weights, metrics, run_dir, tiny_recipe, write_documents
from tunesmith.checkpoint.tensors import load_state
from tunesmith.errors import UserError
from tunesmith.recipe import Recipe
from tunesmith.run import Resume, run


def trained(folder: Path, **sections: Any) -> Recipe:
    recipe = tiny_recipe(folder, **sections)
    run(recipe, folder, Resume())
    return recipe


def with_eval(folder: Path) -> dict[str, Any]:
    return {"eval": [{"path": str(write_documents(folder / "eval.jsonl", 20)), "format": "text"}]}


def facts(recipe: Recipe) -> dict[str, Any]:
    return json.loads((run_dir(recipe) / "environment.json").read_text(encoding="utf-8"))["facts"]


def evaluations(recipe: Recipe) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in metrics(recipe) if "eval_loss" in row}


def saved_steps(recipe: Recipe) -> set[int]:
    return {int(path.name.removeprefix("checkpoint-")) for path in run_dir(recipe).glob("checkpoint-*")}


@pytest.fixture
def rising(tmp_path: Path) -> dict[str, Any]:
    """A learning rate at which the evaluation loss gets worse after a while."""
    return {
        "data": with_eval(tmp_path),
        "optim": {"name": "sgd", "learning_rate": 15.0, "max_grad_norm": None},
        "schedule": {"lr_scheduler_type": "constant", "warmup_steps": 6},
        "evaluation": {"eval_steps": 1},
        "checkpoint": {"save_steps": None, "save_total_limit": 1},
    }


def test_final_has_the_weights_of_the_best_evaluation(tmp_path: Path, rising: dict[str, Any]) -> None:
    recipe = trained(tmp_path, **rising)
    losses = evaluations(recipe)
    best = min(losses, key=lambda step: losses[step])
    assert 0 < best < 10, f"the test needs a best step before the last: {losses}"
    best_weights = load_state(run_dir(recipe) / f"checkpoint-{best}" / "weights")
    assert_same_bits(
        final_weights(recipe), {n: v for n, v in best_weights.items() if n in final_weights(recipe)}
    )
    assert saved_steps(recipe) == {best, 10}, "the newest and the best are kept, whatever save_total_limit"


def test_final_last_has_the_last_weights(tmp_path: Path, rising: dict[str, Any]) -> None:
    recipe = trained(tmp_path, **{**rising, "checkpoint": {"final": "last", "save_total_limit": 1}})
    last = load_state(run_dir(recipe) / "checkpoint-10" / "weights")
    assert_same_bits(final_weights(recipe), {n: v for n, v in last.items() if n in final_weights(recipe)})


def test_early_stopping_counts_evaluations_without_a_gain(tmp_path: Path, rising: dict[str, Any]) -> None:
    evaluation = {"eval_steps": 1, "early_stopping": {"patience": 2}}
    recipe = trained(tmp_path, **{**rising, "evaluation": evaluation})
    losses = list(evaluations(recipe).values())
    assert len(losses) < 10
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 2


def test_an_unknown_metric_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.metric_for_best: f1 is not among .*: loss, perplexity"):
        trained(tmp_path, data=with_eval(tmp_path), evaluation={"metric_for_best": "f1"})


def test_frozen_parameters_keep_their_bits(tmp_path: Path) -> None:
    recipe = trained(
        tmp_path, trainable={"freeze": ["*embed_tokens*", "*layers.0.*"]}, checkpoint={"save_steps": 1}
    )
    first, last = (load_state(run_dir(recipe) / f"checkpoint-{step}" / "weights") for step in (9, 10))
    for name in first:
        frozen = "embed_tokens" in name or "layers.0." in name
        assert torch.equal(first[name], last[name]) == frozen, name
    assert facts(recipe)["trainable_parameters"] < facts(recipe)["total_parameters"]
    optimizer = load_state(run_dir(recipe) / "checkpoint-10" / "optimizer")
    assert not [name for name in optimizer if "embed_tokens" in name]


def test_a_pattern_without_a_parameter_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainable\.freeze: 'encoder\.\*' matches no parameter"):
        trained(tmp_path, trainable={"freeze": ["encoder.*"]})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_fp32(tmp_path: Path, precision: str) -> None:
    plain = trained(tmp_path / "fp32")
    mixed = trained(tmp_path / precision, training={"precision": precision})
    assert facts(mixed)["precision"] == precision
    curves = [[row["loss"] for row in metrics(recipe)] for recipe in (plain, mixed)]
    assert curves[0] != curves[1], "the precision had no effect"
    assert curves[1] == pytest.approx(curves[0], rel=2e-2)
    weights = load_file(run_dir(mixed) / "final" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_an_fp16_overflow_skips_the_step_and_lowers_the_scale(tmp_path: Path) -> None:
    loud = {"optim": {"name": "sgd", "learning_rate": 1e-3}, "training": {"precision": "fp16"}}
    recipe = trained(tmp_path, **loud, model={"config": {**big_gradients()}})
    rows = metrics(recipe)
    skipped = sum(row["grad_norm"] is None for row in rows)
    assert 0 < skipped < 10
    assert rows[-1]["overflows"] == skipped
    assert rows[-1]["loss_scale"] == 65536.0 / 2**skipped
    assert all(torch.isfinite(value).all() for value in final_weights(recipe).values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_sise": 64}, "model.config: LlamaConfig has no hidden_sise"),
        ({"hidden_size": "wide"}, "model.config: Validation error for field 'hidden_size'"),
        ({"model_type": "lama"}, "model.config: "),
    ],
)
def test_a_wrong_model_config_is_one_line(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        trained(tmp_path, model={"config": {**big_gradients(), **config}})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def big_gradients() -> dict[str, Any]:
    """A head whose large weights make fp16 gradients overflow at a loss scale of 65536."""
    from tests.support import TINY

    return {**TINY, "initializer_range": 1.0}


def test_activation_checkpointing_changes_no_number(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain")
    saving = trained(tmp_path / "saving", model={"gradient_checkpointing": True})
    assert [row["loss"] for row in metrics(saving)] == [row["loss"] for row in metrics(plain)]
    assert_same_bits(final_weights(saving), final_weights(plain))


def test_dropout_is_overridden_everywhere(tmp_path: Path) -> None:
    recipe = trained(tmp_path, model={"dropout": 0.25})
    assert facts(recipe)["dropout"] == {"attention_dropout": 0.25}
    config = json.loads((run_dir(recipe) / "final" / "config.json").read_text(encoding="utf-8"))
    assert config["attention_dropout"] == 0.25


def test_the_folder_says_what_ran(tmp_path: Path) -> None:
    recipe = trained(tmp_path)
    found = facts(recipe)
    assert (found["engine"], found["world_size"], found["precision"]) == ("single", 1, "fp32")
    assert found["gradient_accumulation_steps"] == 2
    assert found["data"]["train"]["rows"] == 60
    keys = "step epoch loss learning_rate grad_norm units samples tokens_per_second seconds peak_memory_bytes"
    for row in metrics(recipe):
        assert set(keys.split()) <= row.keys()
    assert [row["samples"] for row in metrics(recipe)][:2] == [8, 16]
    assert (run_dir(recipe) / "report.html").is_file()


@pytest.mark.parametrize(("epochs", "steps"), [(1, 8), (0.5, 4), (0.1, 1), (0.375, 3), (1.01, 9)])
def test_a_part_of_an_epoch_rounds_up_to_whole_steps(tmp_path: Path, epochs: float, steps: int) -> None:
    training = {"max_steps": None, "num_train_epochs": epochs, "global_batch_size": 8}
    assert facts(trained(tmp_path, training=training))["total_steps"] == steps
