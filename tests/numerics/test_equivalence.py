"""How the global batch is cut into micro-batches changes nothing: not a loss, not a gradient norm, not a weight."""

from __future__ import annotations

from itertools import pairwise

import pytest

from objective_cases import (
    ACCUMULATED,
    ADAMW,
    CASES,
    SGD,
    SLOW_SGD,
    WHOLE,
    Run,
    assert_same_curves,
    assert_same_weights,
)


@pytest.mark.parametrize("case", CASES)
def test_unclipped_sgd_does_not_see_the_micro_batches(train: Run, case: str) -> None:
    whole, accumulated = (train(case, SGD, layout, 20) for layout in (WHOLE, ACCUMULATED))
    assert whole.facts["gradient_accumulation_steps"] == 1
    assert accumulated.facts["gradient_accumulation_steps"] == 8
    assert_same_curves(accumulated, whole)
    assert_same_weights(accumulated, whole)


@pytest.mark.parametrize("case", CASES)
def test_clipped_adamw_does_not_see_the_micro_batches(train: Run, case: str) -> None:
    whole, accumulated = (train(case, ADAMW, layout, 30) for layout in (WHOLE, ACCUMULATED))
    assert min(whole.curve("grad_norm")) > ADAMW["optim"]["max_grad_norm"], "every step is clipped"
    assert all(a > b for a, b in pairwise(whole.curve("learning_rate")))
    assert_same_curves(accumulated, whole)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_hundred_steps_of_sgd(train: Run, case: str) -> None:
    whole, accumulated = (train(case, SLOW_SGD, layout, 100) for layout in (WHOLE, ACCUMULATED))
    assert_same_curves(accumulated, whole)
    assert_same_weights(accumulated, whole)
