"""Two ranks train what one process trains: the same losses, gradient norms and weights."""

from __future__ import annotations

import pytest

from objective_cases import (
    ACCUMULATED,
    ADAMW,
    CASES,
    RANKS,
    SGD,
    SLOW_SGD,
    TOLERANCE,
    WHOLE,
    Layout,
    Run,
    apart,
    assert_same_curves,
    assert_same_weights,
)


@pytest.mark.parametrize("case", CASES)
def test_unclipped_sgd_does_not_see_the_ranks(train: Run, case: str) -> None:
    one, two = (train(case, SGD, layout, 20) for layout in (WHOLE, RANKS))
    assert two.facts["engine"] == "ddp"
    assert two.facts["world_size"] == 2
    assert two.facts["gradient_accumulation_steps"] == 2
    assert_same_curves(two, one)
    assert_same_weights(two, one)


@pytest.mark.parametrize("case", CASES)
def test_clipped_adamw_does_not_see_the_ranks(train: Run, case: str) -> None:
    one, two = (train(case, ADAMW, layout, 30) for layout in (WHOLE, RANKS))
    assert_same_curves(two, one)


@pytest.mark.parametrize("case", ["causal_lm", "next_sentence", "regression", "seq2seq_t5"])
def test_a_rank_without_a_row_adds_nothing(train: Run, case: str) -> None:
    """Windows of one row: the second rank runs fillers only."""
    sections = {"training": {"global_batch_size": 1}}
    one, two = (train(case, SGD, layout, 6, **sections) for layout in (Layout(1), Layout(1, world_size=2)))
    assert_same_curves(two, one)
    assert_same_weights(two, one)


def test_packed_sequences_are_dealt_to_ranks(train: Run) -> None:
    sections = {"data": {"packing": True}}
    one, two = (train("sft", SGD, layout, 12, **sections) for layout in (WHOLE, RANKS))
    assert_same_curves(two, one)
    assert_same_weights(two, one)


@pytest.mark.parametrize(
    "case", ["causal_lm", "masked_lm", "multi_label", "question_answering", "seq2seq_bart"]
)
def test_an_evaluation_does_not_see_ranks_and_batches(
    train: Run, workshop_eval: dict[str, dict[str, object]], case: str
) -> None:
    found = [
        train(case, SGD, layout, 3, data=workshop_eval[case], evaluation={"per_device_eval_batch_size": size})
        for layout, size in ((WHOLE, 41), (ACCUMULATED, 3), (RANKS, 4))
    ]
    names = {name for name in found[0].evaluation if name.startswith("eval_") and name != "eval_seconds"}
    assert len(names) > 1
    for other in found[1:]:
        for name in names:
            a, b = other.evaluation[name], found[0].evaluation[name]
            assert a == b or apart(a, b) <= TOLERANCE, name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_hundred_steps_of_sgd_on_two_ranks(train: Run, case: str) -> None:
    one, two = (train(case, SLOW_SGD, layout, 100) for layout in (WHOLE, RANKS))
    assert_same_curves(two, one)
    assert_same_weights(two, one)
