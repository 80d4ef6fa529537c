"""Parameters in bf16: every way to update them learns, resumes bit for bit, and rounds alike on every engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from objective_cases import ADAMW, TWO, WHOLE, Result, Run
from tunesmith.optim import Spec

WAYS = ["bf16_master", "bf16_stochastic", "bf16_kahan"]
ENGINES: dict[str, dict[str, Any]] = {"ddp": {"strategy": "ddp"}, "fsdp2": {"strategy": "fsdp2"}}
STEPS = 20


def asked(precision: str) -> dict[str, Any]:
    return {"training": {"precision": precision}}


def equal_share(found: Result, expected: Result) -> float:
    """Of the weights, by tensor, those that are bitwise equal."""
    pairs = [(found.weights[name], expected.weights[name]) for name in expected.weights]
    return sum(float((a == b).float().mean()) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("way", WAYS)
def test_it_learns_as_fp32_does(train: Run, way: str) -> None:
    exact = train("causal_lm", ADAMW, WHOLE, STEPS)
    found = train("causal_lm", ADAMW, WHOLE, STEPS, **asked(way))
    assert found.facts["precision_why"].startswith("asked for; weights are bf16 too")
    assert {weight.dtype for weight in found.weights.values()} == {torch.bfloat16}
    assert found.curve("loss") == pytest.approx(exact.curve("loss"), rel=0.01)
    assert found.curve("loss")[-1] < 0.95 * found.curve("loss")[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_rounds_alike(train: Run, way: str, engine: str) -> None:
    """The gradients differ by rounding; the noise of stochastic rounding is keyed to the parameter's elements, so it
    does not: without that, nearly every weight would end elsewhere."""
    whole = train("causal_lm", ADAMW, WHOLE, 5, **asked(way))
    found = train("causal_lm", ADAMW, TWO, 5, **asked(way), parallel=ENGINES[engine])
    assert found.curve("loss") == pytest.approx(whole.curve("loss"), rel=2e-3)
    assert equal_share(found, whole) > 0.95


def test_other_noise_ends_elsewhere(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would see if a shard drew other numbers than the whole."""
    whole = train("causal_lm", ADAMW, WHOLE, 5, **asked("bf16_stochastic"))
    made = Spec.of
    monkeypatch.setattr(Spec, "of", lambda *given: replace(made(*given), seed=99))
    other = train(
        "causal_lm", ADAMW, WHOLE, 5, **asked("bf16_stochastic"), checkpoint={"save_total_limit": 9}
    )
    assert equal_share(other, whole) < 0.85
