"""The loss from the hidden states and the head is the loss from the model's logits: every language-model objective, on
every engine; and where the two disagree, the logits it is."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from objective_cases import (
    ADAMW,
    CASES,
    SGD,
    SHARDED,
    SPLIT,
    TWO,
    WHOLE,
    Run,
    assert_same_curves,
    assert_same_weights,
)
from tunesmith.fused_head import HeadOutput

FUSED = [
    "causal_lm", "causal_lm_gpt2", "sft", "masked_lm", "next_sentence", "span_corruption", "seq2seq_t5",
    "seq2seq_bart",
]  # fmt: skip
ENGINES: dict[str, dict[str, Any]] = {"ddp": {"strategy": "ddp"}, **SHARDED}


def path_of(facts: dict[str, Any]) -> str:
    return facts["kernels"]["linear_cross_entropy"]


@pytest.mark.parametrize("case", CASES)
def test_the_fused_loss_trains_as_the_logits_do(train: Run, case: str) -> None:
    found = train(case, SGD, WHOLE, 20)
    assert path_of(found.facts).startswith("cpu" if case in FUSED else "reference"), path_of(found.facts)
    expected = train(case, SGD, WHOLE, 20, kernels="reference")
    assert path_of(expected.facts).startswith("reference")
    assert_same_curves(found, expected)
    assert_same_weights(found, expected)


@pytest.mark.parametrize("case", ["causal_lm", "causal_lm_gpt2", "masked_lm"])
@pytest.mark.parametrize("path", ["torch", "cpu"])
def test_each_path_under_adamw(train: Run, case: str, path: str) -> None:
    found = train(case, ADAMW, WHOLE, 20, kernels={"linear_cross_entropy": path})
    assert path_of(found.facts).startswith(path)
    assert_same_curves(found, train(case, ADAMW, WHOLE, 20, kernels="reference"))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_fuses(train: Run, engine: str) -> None:
    """Tied weights (GPT-2): the head's gradient is added to the embedding's, whatever the shards."""
    found = train("causal_lm_gpt2", SGD, TWO, 10, parallel=ENGINES[engine])
    assert path_of(found.facts).startswith("cpu")
    expected = train("causal_lm_gpt2", SGD, WHOLE, 10, kernels="reference")
    assert_same_curves(found, expected)
    assert_same_weights(found, expected)


def test_a_head_split_by_classes_is_left_to_the_model(train: Run) -> None:
    found = train("causal_lm", SGD, TWO, 5, parallel=SPLIT)
    assert path_of(found.facts) == "reference: tensor parallelism spreads the head's classes over the ranks"


def test_a_fused_loss_that_disagrees_is_not_used(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = HeadOutput.cross_entropy

    def wrong(self: HeadOutput, target: Tensor, **options: Any) -> Tensor:
        return compute(self, target, **options) * 1.001

    monkeypatch.setattr(HeadOutput, "cross_entropy", wrong)
    found = train("causal_lm", SGD, WHOLE, 6)
    assert "disagreed with the model's own logits by 1.0e-03" in path_of(found.facts)
    assert_same_curves(found, train("causal_lm", SGD, WHOLE, 6, kernels="reference"))


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 5e-3), ("fp16", 5e-3)])
def test_sixteen_bits(train: Run, precision: str, tolerance: float) -> None:
    """Losses, not weights: the logits are rounded to 16 bits on both ways, their gradients in another order."""
    asked = {"training": {"precision": precision, "max_steps": 10, "global_batch_size": 16, "seed": 3}}
    found = train("causal_lm", SGD, WHOLE, 10, **asked)
    expected = train("causal_lm", SGD, WHOLE, 10, **asked, kernels="reference")
    assert path_of(found.facts).startswith("cpu" if precision == "bf16" else "torch")
    for key in ("loss", "grad_norm"):
        assert found.curve(key) == pytest.approx(expected.curve(key), rel=tolerance), key
