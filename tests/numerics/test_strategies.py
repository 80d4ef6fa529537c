"""Every engine trains what one process trains: losses, gradient norms, weights, order of samples; and a run can be
continued by any of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from objective_cases import (
    ADAMW,
    ALONE,
    CASES,
    FOUR,
    OFFLOADED,
    SGD,
    SHARDED,
    SHARED,
    SLOW_SGD,
    SPLIT,
    TOLERANCE,
    TWO,
    WHOLE,
    Layout,
    Run,
    assert_same_curves,
    assert_same_weights,
)

CORE = ["sft", "single_label"]


@pytest.mark.parametrize("case", CORE)
@pytest.mark.parametrize("strategy", [*SHARDED, *OFFLOADED])
def test_unclipped_sgd_does_not_see_the_engine(train: Run, case: str, strategy: str) -> None:
    parallel = (SHARDED | OFFLOADED)[strategy]
    one, two = train(case, SGD, WHOLE, 20), train(case, SGD, TWO, 20, parallel=parallel)
    assert two.facts["engine"] == parallel["strategy"]
    assert two.facts["shard_size"] == 2
    assert_same_curves(two, one)
    assert_same_weights(two, one)


@pytest.mark.parametrize("case", CORE)
@pytest.mark.parametrize("strategy", [*SHARDED, *OFFLOADED])
def test_clipped_adamw_does_not_see_the_engine(train: Run, case: str, strategy: str) -> None:
    parallel = (SHARDED | OFFLOADED)[strategy]
    one, two = train(case, ADAMW, WHOLE, 30), train(case, ADAMW, TWO, 30, parallel=parallel)
    assert min(one.curve("grad_norm")) > 0.1, "every step is meant to be clipped"
    assert_same_curves(two, one)


@pytest.mark.parametrize("case", CORE)
@pytest.mark.parametrize("engine", ["single", "ddp", *SHARDED])
def test_the_losses_are_those_of_the_golden_file(train: Run, case: str, engine: str) -> None:
    """One process and all engines could drift together: the file holds them where they were. A change that is meant
    to change the mathematics changes the file, in the same commit."""
    golden = json.loads((Path(__file__).parent / "golden_losses.json").read_text())
    layout = WHOLE if engine == "single" else TWO
    for name, optimizer, steps in (("adamw", ADAMW, 30), ("sgd", SGD, 20)):
        parallel = {} if engine in {"single", "ddp"} else {"parallel": SHARDED[engine]}
        found = train(case, optimizer, layout, steps, **parallel)
        for key, expected in golden[f"{case} {name}"].items():
            assert found.curve(key) == pytest.approx(expected, rel=TOLERANCE), (name, key)


@pytest.mark.parametrize("case", sorted(set(CASES) - set(CORE)))
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_every_objective_trains_in_shards(train: Run, case: str, strategy: str) -> None:
    one, two = train(case, SGD, WHOLE, 20), train(case, SGD, TWO, 20, parallel=SHARDED[strategy])
    assert_same_curves(two, one)
    assert_same_weights(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("case", CORE)
@pytest.mark.parametrize("layout", [ALONE, TWO, FOUR], ids=["1", "2", "4"])
@pytest.mark.parametrize("strategy", ["ddp", *SHARDED])
def test_a_hundred_steps_on_any_number_of_ranks(train: Run, case: str, layout: Layout, strategy: str) -> None:
    parallel = SHARDED.get(strategy, {"strategy": strategy})
    one, many = (
        train(case, SLOW_SGD, WHOLE, 100),
        train(case, SLOW_SGD, layout, 100, parallel=parallel),
    )
    assert_same_curves(many, one)
    assert_same_weights(many, one)
    one, many = train(case, ADAMW, WHOLE, 30), train(case, ADAMW, layout, 30, parallel=parallel)
    assert_same_curves(many, one)


@pytest.mark.slow
@pytest.mark.parametrize("case", CORE)
def test_copies_of_shards(train: Run, case: str) -> None:
    """Hybrid sharding: two copies of two shards."""
    parallel = {"strategy": "fsdp2", "shard_size": 2}
    one, four = train(case, SGD, WHOLE, 20), train(case, SGD, FOUR, 20, parallel=parallel)
    assert (four.facts["shard_size"], four.facts["replicas"]) == (2, 2)
    assert_same_curves(four, one)
    assert_same_weights(four, one)


@pytest.mark.parametrize("case", ["sft", "causal_lm"])
def test_layers_that_two_ranks_compute_together(train: Run, case: str) -> None:
    """Measured: losses and norms to 4e-7, weights to 5e-7."""
    for optimizer, steps in ((SGD, 20), (ADAMW, 30)):
        one, two = train(case, optimizer, WHOLE, steps), train(case, optimizer, TWO, steps, parallel=SPLIT)
        assert (two.facts["tensor_parallel_size"], two.facts["data_parallel_size"]) == (2, 1)
        assert two.facts["tensor_parallel_parameters"] > 10
        assert_same_curves(two, one)
        assert_same_weights(two, one)


@pytest.mark.slow
def test_split_layers_in_shards(train: Run) -> None:
    """Tensor parallel × FSDP2 on 2 × 2 ranks."""
    for optimizer, steps in ((SGD, 20), (ADAMW, 30)):
        one, four = (
            train("sft", optimizer, WHOLE, steps),
            train("sft", optimizer, FOUR, steps, parallel=SPLIT),
        )
        assert (four.facts["shard_size"], four.facts["data_parallel_size"]) == (2, 2)
        assert_same_curves(four, one)
        assert_same_weights(four, one)


@pytest.mark.parametrize("case", ["sft", "causal_lm"])
def test_sequences_that_two_ranks_share(
    train: Run, workshop_eval: dict[str, dict[str, object]], case: str
) -> None:
    """Heads are exchanged for attention; labels cross the cut. Measured: 3e-7."""
    sections = {"data": workshop_eval[case], "evaluation": {"generate": {"max_new_tokens": 4}}}
    for optimizer, steps in ((SGD, 20), (ADAMW, 30)):
        one = train(case, optimizer, WHOLE, steps, **sections)
        two = train(case, optimizer, TWO, steps, parallel=SHARED, **sections)
        assert (two.facts["sequence_parallel_size"], two.facts["data_parallel_size"]) == (2, 1)
        assert_same_curves(two, one)
        assert_same_weights(two, one)
        assert two.curve("tokens") == one.curve("tokens")
        for name in ("eval_loss", "eval_bleu"):
            assert two.evaluation[name] == pytest.approx(one.evaluation[name], rel=TOLERANCE)


@pytest.mark.slow
def test_shared_sequences_beside_others(train: Run) -> None:
    """Two pairs of ranks, each with rows of its own, in four shards; GQA with fewer key heads than ranks."""
    one, four = train("sft", ADAMW, WHOLE, 20), train("sft", ADAMW, FOUR, 20, parallel=SHARED)
    assert (four.facts["shard_size"], four.facts["data_parallel_size"]) == (4, 2)
    assert_same_curves(four, one)
    whole = {"strategy": "fsdp2", "sequence_parallel_size": 4}
    assert_same_curves(train("sft", ADAMW, FOUR, 20, parallel=whole), one)


def test_a_model_without_a_plan_is_not_split(train: Run) -> None:
    with pytest.raises(RuntimeError, match="no tensor-parallel plan for Bert"):
        train("single_label", SGD, TWO, 1, parallel=SPLIT)


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_recomputed_activations_change_nothing(train: Run, strategy: str) -> None:
    model = {"gradient_checkpointing": True}
    one = train("sft", SGD, WHOLE, 10)
    two = train("sft", SGD, TWO, 10, parallel=SHARDED[strategy], model=model)
    assert_same_curves(two, one)
    assert_same_weights(two, one)


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_new_weights_are_the_same_on_every_engine(train: Run, workshop: Path, strategy: str) -> None:
    """A model made by its seed alone, and a head that the checkpoint lacks."""
    drawn = {"init": "from_config"}
    headless = {"model_name_or_path": str(workshop / "models" / "bert_mlm")}
    for case, model in (("sft", drawn), ("single_label", headless)):
        one = train(case, SGD, WHOLE, 2, model=model)
        two = train(case, SGD, TWO, 2, model=model, parallel=SHARDED[strategy])
        assert two.facts.get("new_weights") == one.facts.get("new_weights")
        assert_same_weights(two, one)


@pytest.mark.parametrize("strategy", ["zero1", "zero3", "fsdp2"])
def test_a_frozen_part_stays_as_it_is(train: Run, strategy: str) -> None:
    trainable = {"freeze": ["*embed*"]}
    one = train("sft", SGD, WHOLE, 5, trainable=trainable)
    two = train("sft", SGD, TWO, 5, trainable=trainable, parallel=SHARDED[strategy])
    assert_same_curves(two, one)
    assert_same_weights(two, one)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp2"])
def test_an_evaluation_does_not_see_the_engine(
    train: Run, workshop_eval: dict[str, dict[str, object]], strategy: str
) -> None:
    generate = {"generate": {"max_new_tokens": 4}}
    one, two = (
        train("sft", SGD, layout, 3, data=workshop_eval["sft"], evaluation=generate, **more)
        for layout, more in ((WHOLE, {}), (TWO, {"parallel": SHARDED[strategy]}))
    )
    names = {name for name in one.evaluation if name.startswith("eval_") and name != "eval_seconds"}
    assert "eval_bleu" in names
    for name in names:
        assert two.evaluation[name] == pytest.approx(one.evaluation[name], rel=1e-5), name


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_packed_rows_in_shards(train: Run, strategy: str) -> None:
    sections = {"data": {"packing": True}}
    one = train("sft", SGD, WHOLE, 12, **sections)
    two = train("sft", SGD, TWO, 12, parallel=SHARDED[strategy], **sections)
    assert_same_curves(two, one)
    assert_same_weights(two, one)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_one_process(train: Run, strategy: str, precision: str) -> None:
    """Gradients are reduced in fp32 everywhere; FSDP2 also gathers 16-bit weights, and rounds its norms."""
    sections = {"training": {"precision": precision}}
    parallel = SHARDED.get(strategy, {"strategy": strategy})
    one, two = (
        train("sft", SGD, WHOLE, 10, **sections),
        train("sft", SGD, TWO, 10, parallel=parallel, **sections),
    )
    assert two.facts["precision"] == precision
    for key in ("loss", "grad_norm"):
        assert two.curve(key) == pytest.approx(one.curve(key), rel=2e-2), key
