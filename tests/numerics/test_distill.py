"""Distillation in whole runs: however the rows are split, the curve is the same, on every engine; a teacher is a
finished run."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill_runs import distil, some, trained
from objective_cases import (
    ACCUMULATED,
    CASES,
    RANKS,
    SGD,
    SHARDED,
    WHOLE,
    Run,
    assert_same_curves,
    assert_same_weights,
)

EAGER = {"attn_implementation": "eager"}
EVERY_LOSS = [
    {"type": "logits", "divergence": "jsd", "beta": 0.3},
    {"type": "hidden", "weight": 0.5},
    {"type": "hidden", "loss": "cosine", "layers": {2: 1}},
    {"type": "attention"},
    {"type": "embedding"},
]


@pytest.mark.parametrize("case", some(CASES, "causal_lm", "single_label", "question_answering"))
def test_the_curve_is_the_same_however_the_rows_are_split(train: Run, workshop: Path, case: str) -> None:
    settings = distil(trained(workshop, case))
    whole = train(case, SGD, WHOLE, 4, distill=settings)
    assert all(row["loss/distill_logits"] > 0 for row in whole.rows)
    for layout in (ACCUMULATED, RANKS):
        split = train(case, SGD, layout, 4, distill=settings)
        assert_same_curves(split, whole)
        assert_same_weights(split, whole)


@pytest.mark.parametrize(
    "case", some(["single_label", "causal_lm", "masked_lm", "seq2seq_t5"], "single_label")
)
def test_every_loss_is_the_same_however_the_rows_are_split(train: Run, workshop: Path, case: str) -> None:
    settings = distil(trained(workshop, case), losses=EVERY_LOSS)
    whole = train(case, SGD, WHOLE, 4, model=EAGER, distill=settings)
    kinds = {key.partition("/")[2].split("_")[1] for key in whole.rows[0] if key.startswith("loss/distill")}
    assert kinds == {"logits", "hidden", "attention", "embedding"}
    for layout in (ACCUMULATED, RANKS):
        split = train(case, SGD, layout, 4, model=EAGER, distill=settings)
        assert_same_curves(split, whole)
        assert_same_weights(split, whole)


THIN = {
    "init": "from_config",
    "config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
}


@pytest.mark.parametrize("strategy", some(["ddp", *SHARDED], "zero3", "fsdp2"))
def test_every_engine_distils_alike(train: Run, workshop: Path, strategy: str) -> None:
    parallel = {"ddp": {"strategy": "ddp"}, **SHARDED}[strategy]
    settings = distil(trained(workshop, "causal_lm"), losses=[{"type": "logits"}, {"type": "hidden"}])
    alone = train("causal_lm", SGD, WHOLE, 4, model=THIN, distill=settings)
    ranks = train("causal_lm", SGD, RANKS, 4, model=THIN, distill=settings, parallel=parallel)
    assert_same_curves(ranks, alone)
    assert_same_weights(ranks, alone)
    assert not any("extras" in name for name in alone.weights)


@pytest.mark.parametrize("strategy", some(["ddp", *SHARDED], "fsdp2"))
def test_every_engine_begins_with_the_teachers_layers(train: Run, workshop: Path, strategy: str) -> None:
    parallel = {"ddp": {"strategy": "ddp"}, **SHARDED}[strategy]
    settings = distil(trained(workshop, "single_label"), init="last_k")
    sections = {"model": {"config": {"num_hidden_layers": 1}}, "distill": settings}
    alone = train("single_label", SGD, WHOLE, 3, **sections)
    ranks = train("single_label", SGD, RANKS, 3, **sections, parallel=parallel)
    assert alone.facts["teacher_layers"] == {"bert.encoder.layer": [1]}
    assert_same_curves(ranks, alone)
    assert_same_weights(ranks, alone)


@pytest.mark.parametrize("case", some(["causal_lm", "single_label"], "causal_lm"))
def test_a_teacher_that_fsdp2_shards_teaches_the_same(train: Run, workshop: Path, case: str) -> None:
    whole = distil(trained(workshop, case))
    sharded = {
        "teachers": [{"model_name_or_path": trained(workshop, case), "placement": "sharded"}],
        "temperature": 2.0,
    }
    alone = train(case, SGD, WHOLE, 4, distill=whole)
    ranks = train(case, SGD, RANKS, 4, distill=sharded, parallel={"strategy": "fsdp2"})
    assert_same_curves(ranks, alone)
    assert_same_weights(ranks, alone)
