"""R-Drop on any number of micro-batches, ranks and shards, with two passes that differ by what hangs on the row alone;
with dropout, a run stopped and continued."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine_ranks import EngineRanks
from objective_cases import (
    ACCUMULATED,
    ADAMW,
    CASES,
    SGD,
    SHARDED,
    TWO,
    WHOLE,
    Layout,
    apart,
    open_stream,
    recipe,
)
from rank_pool import Pools
from test_strategies_resume import interrupted
from tunesmith.batch import Batch
from tunesmith.engine import build_engine
from tunesmith.fused_head import FusedHead
from tunesmith.fusing import choose_head
from tunesmith.loss_scale import LossScale
from tunesmith.module import TrainModule
from tunesmith.optim import Spec
from tunesmith.parts import ForwardPart, Strategies
from tunesmith.recipe import Recipe
from tunesmith.regularization.r_drop import TwoViews, divergences
from tunesmith.run import Resume, run
from tunesmith.step import train_step

ENGINES: dict[str, dict[str, Any]] = {"ddp": {"strategy": "ddp"}, **SHARDED}
STEPS = 4


class Shake(ForwardPart):
    """In place of dropout: adds to the embeddings a wave of the row's own number and of which copy it is."""

    def __init__(self, model: Any) -> None:
        self.embedding: nn.Module = getattr(model, "encoder", model).get_input_embeddings()

    @contextmanager
    def around(self, batch: Batch) -> Generator[None]:
        assert batch.draws is not None
        copies = torch.arange(len(batch.draws)) // (len(batch.draws) // 2)
        phase = (batch.draws % 1000).double() + 1.7 * copies

        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            places = torch.arange(output[0].numel()).view(output[0].shape)
            return output + 0.3 * torch.sin(phase.view(-1, 1, 1) + places).to(output.dtype)

        hook = self.embedding.register_forward_hook(add)
        yield
        hook.remove()


def train(made: Recipe, base: Path, alpha: float, fused: bool) -> dict[str, Any]:
    """Some steps of one rank: losses, norms, weights."""
    stream = open_stream(made, base)
    objective = stream.objective
    model = objective.auto_class.from_pretrained(made.model.model_name_or_path)
    terms = divergences(objective.terms, alpha)
    strategies = Strategies(terms, (TwoViews(noisy=True), Shake(model)))
    module = TrainModule(model, objective, "fp32", terms, strategies.forward)
    if fused:
        head = choose_head(made, model, objective)
        assert isinstance(head, FusedHead), head
        module.fused_head = head
    engine = build_engine(made)
    try:
        engine.prepare(module, lambda device: None, Spec.of(made))
        engine.module.train()
        rows: list[list[float]] = []
        for step in range(STEPS):
            found = train_step(
                engine,
                stream.batches(step, engine.data_rank, engine.data_size, prefetch=False),
                module.terms,
                step=step,
                seed=3,
                learning_rate=0.05,
                max_grad_norm=None,
                scale=LossScale(False, engine.device),
                broken=torch.zeros(()),
                stop=False,
                strategies=strategies,
            )
            rows.append([*found.terms.tolist(), float(found.norm)])
        return {"rows": rows, "weights": {k: v.clone() for k, v in engine.whole_weights().items()}}
    finally:
        engine.close()


def asked(workshop: Path, case: str, layout: Layout, **parallel: Any) -> Recipe:
    return recipe(workshop, CASES[case], SGD, layout, STEPS, parallel=parallel or {"strategy": "single"})


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for step, (ours, theirs) in enumerate(zip(found["rows"], expected["rows"], strict=True)):
        for a, b in zip(ours, theirs, strict=True):
            assert apart(a, b) < 1e-5, f"step {step}: {a} and {b}"
    for name, value in expected["weights"].items():
        assert float((found["weights"][name] - value).norm() / value.norm().clamp_min(1e-9)) < 1e-5, name


@pytest.fixture(scope="module")
def ranks() -> Iterator[EngineRanks]:
    made = EngineRanks.start(2)
    yield made
    made.stop()


@pytest.mark.parametrize(
    "case",
    ["single_label", "multi_label", "regression", "token_classification", "question_answering", "sft",
     "next_sentence", "seq2seq_t5"],
)  # fmt: skip
def test_micro_batches_change_nothing(workshop: Path, case: str) -> None:
    whole, parts = (
        train(asked(workshop, case, layout), workshop, 2.0, False) for layout in (WHOLE, ACCUMULATED)
    )
    assert_equal(parts, whole)
    own = len(whole["rows"][0]) // 2
    assert all(value > 1e-4 for row in whole["rows"] for value in row[own : 2 * own]), "the copies were equal"


def test_without_logits_it_is_the_same(workshop: Path) -> None:
    fused, whole = (train(asked(workshop, "sft", WHOLE), workshop, 2.0, way) for way in (True, False))
    assert_equal(fused, whole)


@pytest.mark.parametrize("case", ["single_label", "sft"])
@pytest.mark.parametrize("strategy", ENGINES)
def test_every_engine_draws_the_two_passes_together_alike(
    workshop: Path, ranks: EngineRanks, case: str, strategy: str
) -> None:
    fused = case == "sft"
    one = train(asked(workshop, case, WHOLE), workshop, 2.0, fused)
    for found in ranks.call(train, asked(workshop, case, TWO, **ENGINES[strategy]), workshop, 2.0, fused)[:1]:
        assert_equal(found, one)


EVERYTHING: dict[str, Any] = {
    "l1": 1e-4,
    "l2": 1e-4,
    "r_drop": {"alpha": 1.0},
    "sharpness": {"type": "sam"},
    "adversarial": {"type": "pgd", "steps": 2},
    "gradient_noise": {"eta": 1e-4},
    "max_norm": {"value": 0.2},
}


@pytest.mark.parametrize("strategy", ["single", *ENGINES])
def test_a_resumed_run_ends_with_the_same_bits(workshop: Path, pools: Pools, strategy: str) -> None:
    """With dropout, and all of it at once."""
    alone = strategy == "single"
    made = recipe(
        workshop, CASES["single_label"], ADAMW, WHOLE if alone else TWO, 4,
        model={"dropout": 0.1}, regularization=EVERYTHING,
        parallel={"strategy": "single"} if alone else ENGINES[strategy],
        checkpoint={"save_steps": 2, "save_total_limit": None, "final": "last"},
    )  # fmt: skip
    runs, names = workshop / "runs", [f"regularized-{strategy}", f"regularized-{strategy}-again"]
    for name in names:
        how = Resume()
        if name.endswith("again"):
            interrupted(runs / names[0], runs / name, 2)
            how = Resume(resume=True)
        named = made.model_copy(update={"run_name": name})
        if alone:
            run(named, workshop, how)
        else:
            pools[2].run(named, workshop, how)
    a, b = (load_file(runs / name / "final" / "model.safetensors") for name in names)
    for name, tensor in a.items():
        assert tensor.equal(b[name]), name
