"""A head trained on cached features is the head trained behind its frozen backbone: the same losses step by step, the
same weights, the same evaluation; for every objective with a head, on one process and on two ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from objective_cases import (
    ADAMW,
    CASES,
    SGD,
    TOLERANCE,
    TWO,
    WHOLE,
    Run,
    assert_same_curves,
    assert_same_weights,
    read_result,
    recipe,
)
from tunesmith import optim
from tunesmith.data.prepare import Dataset, prepare
from tunesmith.engine import Engine, build_engine
from tunesmith.evaluator import evaluate
from tunesmith.features import cache_features
from tunesmith.loss_scale import LossScale
from tunesmith.model import load_model
from tunesmith.module import TrainModule
from tunesmith.objectives import Objective, build_objective
from tunesmith.recipe import Recipe
from tunesmith.run import Resume, run
from tunesmith.step import train_step
from tunesmith.streams import build_stream
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash

STEPS = 6
HEADS = ["single_label", "multi_label", "regression", "pairs", "token_classification", "question_answering"]
FAMILIES = ["llama", "gpt2", "bart", "t5"]
HEAD_ONLY = {"freeze": ["backbone"]}
CACHED = {"freeze": ["backbone"], "cache_features": True}


@dataclass
class Built:
    """A run's objects, the backbone frozen: in eval mode whatever mode the rest is in."""

    recipe: Recipe
    engine: Engine
    objective: Objective
    datasets: dict[str, Dataset]

    @property
    def model(self) -> Any:
        return self.engine.train_module.model

    def cache(self) -> dict[str, Any]:
        return cache_features(self.engine, self.recipe, self.objective, self.datasets)

    def steps(self, count: int = STEPS) -> list[tuple[float, float]]:
        """(loss, norm of the gradient) of each step."""
        stream = build_stream(self.recipe, self.datasets["train"], self.objective)
        engine, scale = self.engine, LossScale(False, torch.device("cpu"))
        engine.module.train()
        self.model.base_model.eval()
        found: list[tuple[float, float]] = []
        for step in range(count):
            batches = stream.batches(step, engine.data_rank, engine.data_size, prefetch=False)
            result = train_step(
                engine, batches, self.objective.terms, step=step, seed=3, learning_rate=1e-2, max_grad_norm=1.0,
                scale=scale, broken=torch.zeros(()), stop=False,
            )  # fmt: skip
            found.append((float(result.loss), float(result.norm)))
        return found

    def head(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}


def build(made: Recipe, base: Path) -> Built:
    tokenizer, _ = tokenizer_for(made, base)
    objective = build_objective(made, tokenizer)
    datasets = prepare(made.data, base, objective, tokenizer_hash(tokenizer))
    engine = build_engine(made)
    model = load_model(made.model, base, objective, tokenizer, 0).model
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)
    engine.prepare(
        TrainModule(model, objective, "bf16" if made.training.precision == "bf16" else "fp32").train(),
        lambda device: None,
        optim.Spec.of(made),
    )
    return Built(made, engine, objective, datasets)


@pytest.fixture
def build_case(workshop: Path, tmp_path: Path) -> Callable[..., Built]:
    """build_case(case, family=None, **sections): with every third row in eval, and a cache of its own."""

    def make(case: str, family: str | None = None, **sections: Any) -> Built:
        values: dict[str, Any] = {
            "trainable": CACHED,
            "data": {"split": {"eval": 0.3}, "cache_dir": str(tmp_path / "cache")},
        }
        if family == "gpt2":  # whose config names no pad token
            values["model"] = {"config": {"pad_token_id": 0}}
        values |= sections
        chosen = CASES[case] if family is None else replace(CASES[case], model=family)
        return build(recipe(workshop, chosen, ADAMW, WHOLE, STEPS, **values), workshop)

    return make


def assert_same_training(cached: Built, whole: Built, tolerance: float = 1e-5) -> None:
    """`cached` has its features; both train, then evaluate."""
    ran: list[int] = []
    handle = next(
        m for m in cached.model.base_model.modules() if isinstance(m, torch.nn.Embedding)
    ).register_forward_hook(lambda *_: ran.append(1))
    before = {n: p.clone() for n, p in cached.model.base_model.state_dict().items()}
    found, expected = cached.steps(), whole.steps()
    assert expected[0] != expected[-1]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
    head = whole.head()
    assert head.keys() == cached.head().keys()
    for name, value in cached.head().items():
        assert value.numpy() == pytest.approx(head[name].numpy(), rel=1e-4, abs=tolerance), name
    scores = [
        evaluate(one.engine, one.objective, one.datasets["eval"], 5, 0).metrics for one in (cached, whole)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=tolerance)
    assert not ran, "the backbone was run"
    handle.remove()
    for name, value in cached.model.base_model.state_dict().items():
        assert torch.equal(value, before[name]), name
    # the trained head behind the backbone itself: what final/ holds
    del cached.model.base_model.forward
    again = evaluate(cached.engine, cached.objective, cached.datasets["eval"], 5, 0).metrics
    assert again == pytest.approx(scores[0], rel=tolerance)


@pytest.mark.parametrize("case", HEADS)
def test_every_objective_with_a_head(build_case: Callable[..., Built], case: str) -> None:
    """With dropout in the head, which draws what it draws behind the backbone."""
    sections = {"model": {"config": {"classifier_dropout": 0.3}}}
    cached, whole = build_case(case, **sections), build_case(case, **sections)
    facts = cached.cache()
    assert facts["cached_features_difference"] <= 1e-6
    assert facts["cached_features_loss_difference"] <= 1e-6
    assert facts["cached_features_rows"] == {name: len(data) for name, data in cached.datasets.items()}
    assert_same_training(cached, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(build_case: Callable[..., Built], family: str) -> None:
    cached, whole = build_case("single_label", family), build_case("single_label", family)
    assert cached.cache()["cached_features"]["last_hidden_state"].startswith("last [32]")
    assert_same_training(cached, whole)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_states_of_every_token(build_case: Callable[..., Built], family: str) -> None:
    cached, whole = build_case("token_classification", family), build_case("token_classification", family)
    assert cached.cache()["cached_features"]["last_hidden_state"].startswith("every [32]")
    assert_same_training(cached, whole)


def test_bf16(build_case: Callable[..., Built]) -> None:
    precision = {"training": {"precision": "bf16", "max_steps": STEPS, "global_batch_size": 16, "seed": 3}}
    cached, whole = (build_case("single_label", **precision) for _ in range(2))
    assert cached.cache()["cached_features"]["pooler_output"] == "row [32] torch.bfloat16"
    assert_same_training(cached, whole, tolerance=1e-2)


def test_the_features_are_those_of_the_batch(build_case: Callable[..., Built]) -> None:
    """In every batch of an epoch, whatever its padding."""
    cached, whole = build_case("question_answering"), build_case("question_answering")
    cached.cache()
    whole.model.eval()
    stream = build_stream(whole.recipe, whole.datasets["train"], whole.objective)
    for step in range(stream.steps_per_epoch):
        for batch in stream.batches(step, 0, 1, prefetch=False):
            kept = batch.inputs["attention_mask"].bool()
            with torch.no_grad():
                own, ours = (
                    one.model.base_model(**batch.inputs).last_hidden_state[kept] for one in (whole, cached)
                )
            assert float((own - ours).abs().max() / own.abs().max()) <= 1e-6


@pytest.mark.parametrize(
    ("case", "engine"),
    [
        ("single_label", {"strategy": "auto"}),
        ("single_label", {"strategy": "ddp"}),
        ("token_classification", {"strategy": "ddp"}),
        ("single_label", {"strategy": "zero1"}),
        ("question_answering", {"strategy": "zero2"}),
    ],
)
def test_whole_runs(
    train: Run, workshop_eval: dict[str, dict[str, Any]], tmp_path: Path, case: str, engine: dict[str, Any]
) -> None:
    """Curve, evaluation and final/ of a run with the cache, on one process or two, beside one process without: two
    ranks divide the computing, and read one cache."""
    layout = WHOLE if engine["strategy"] == "auto" else TWO
    own = {"data": workshop_eval[case] | {"cache_dir": str(tmp_path)}, "parallel": engine}
    found = train(case, SGD, layout, STEPS, trainable=CACHED, **own)
    expected = train(case, SGD, WHOLE, STEPS, trainable=HEAD_ONLY, data=workshop_eval[case])
    assert_same_curves(found, expected)
    assert_same_weights(found, expected)
    for name, value in expected.evaluation.items():
        if name.startswith("eval_") and name != "eval_seconds":
            assert found.evaluation[name] == pytest.approx(value, rel=TOLERANCE), name
    rows = found.facts["cached_features_rows"]
    assert found.facts["cached_features_computed_rows"] == sum(rows.values()) > 0
    assert set(rows) == {"train", "eval"}


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_engines_that_shard_are_refused(train: Run, strategy: str) -> None:
    with pytest.raises(
        RuntimeError, match=rf"cache_features: parallel\.strategy: {strategy} spreads a backbone"
    ):
        train("single_label", SGD, TWO, 2, trainable=CACHED, parallel={"strategy": strategy})


def test_a_resumed_run_ends_with_the_same_bits(workshop: Path, tmp_path: Path) -> None:
    """On the features that the first run left."""
    made = recipe(
        workshop, CASES["single_label"], ADAMW, WHOLE, STEPS, trainable=CACHED, data={"cache_dir": str(tmp_path)},
        model={"config": {"classifier_dropout": 0.3}}, checkpoint={"save_steps": 3, "save_total_limit": None},
        output_dir=str(tmp_path / "runs"), run_name="whole",
    )  # fmt: skip
    run(made, workshop, Resume())
    whole, again = tmp_path / "runs" / "whole", tmp_path / "runs" / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / f"checkpoint-{STEPS}")
    shutil.rmtree(again / "final")
    run(made.model_copy(update={"run_name": "again"}), workshop, Resume(resume=True))
    expected, found = read_result(whole), read_result(again)
    assert found.facts["cached_features_computed_rows"] == 0
    assert all(torch.equal(value, found.weights[name]) for name, value in expected.weights.items())
