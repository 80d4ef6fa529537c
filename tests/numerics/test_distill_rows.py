"""Distillation with other rows, other teachers and other students: answers made on the way or before, likeliest classes
from the disk, unlike tokens, several teachers, adapters, packing; and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from distill_runs import distil, some, trained
from objective_cases import (
    ACCUMULATED,
    ADAMW,
    CASES,
    RANKS,
    SGD,
    SHARDED,
    TWO,
    WHOLE,
    Run,
    apart,
    assert_same_curves,
    assert_same_weights,
    open_stream,
    read_result,
    recipe,
)
from rank_pool import Pools
from test_strategies_resume import interrupted
from tiny_models import byte_bpe, llama_config
from tunesmith.commands.finished import open_run
from tunesmith.distill.divergence import Divergence
from tunesmith.errors import UserError
from tunesmith.run import Resume, run


@pytest.mark.parametrize("case", some(["sft", "causal_lm", "seq2seq_t5"], "causal_lm"))
def test_answers_of_the_student_are_the_same_however_rows_are_split(
    train: Run, workshop: Path, case: str
) -> None:
    settings = distil(trained(workshop, case), on_policy={"lmbda": 0.5, "max_new_tokens": 6})
    whole = train(case, SGD, WHOLE, 3, distill=settings)
    plain = train(case, SGD, WHOLE, 3, distill=distil(trained(workshop, case), alpha=0.0))
    assert whole.curve("units") != plain.curve("units")
    for layout in (ACCUMULATED, RANKS):
        split = train(case, SGD, layout, 3, distill=settings)
        assert_same_curves(split, whole)
        assert_same_weights(split, whole)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [*SHARDED])
def test_sharded_students_answer_alike(train: Run, workshop: Path, strategy: str) -> None:
    settings = distil(trained(workshop, "sft"), on_policy={"lmbda": 0.5, "max_new_tokens": 6})
    whole = train("sft", SGD, WHOLE, 3, distill=settings)
    ranks = train("sft", SGD, RANKS, 3, distill=settings, parallel=SHARDED[strategy])
    assert_same_curves(ranks, whole)
    assert_same_weights(ranks, whole)


@pytest.mark.parametrize("case", some(["sft", "seq2seq_t5"], "sft"))
def test_the_teachers_answers_take_the_place_of_the_datas(train: Run, workshop: Path, case: str) -> None:
    settings = {
        "teacher_model_name_or_path": trained(workshop, case),
        "sequence_level": {"max_new_tokens": 6, "num_beams": 2},
    }
    whole = train(case, SGD, WHOLE, 3, distill=settings)
    data = train(case, SGD, WHOLE, 3)
    assert whole.curve("loss") != data.curve("loss")
    split = train(case, SGD, RANKS, 3, distill=settings)
    assert_same_curves(split, whole)


@pytest.mark.parametrize(
    "case", some(["causal_lm", "single_label", "token_classification", "seq2seq_t5"], "causal_lm")
)
def test_classes_from_the_disk_are_those_of_the_teacher(train: Run, workshop: Path, case: str) -> None:
    teacher = trained(workshop, case)
    for top_k in (3, 1000):
        online = distil(teacher, losses=[{"type": "logits", "top_k": top_k}])
        asked = train(case, SGD, WHOLE, 3, distill=online)
        kept = train(case, SGD, ACCUMULATED, 3, distill=distil(teacher, offline={"top_k": top_k}))
        assert_same_curves(kept, asked)
        assert_same_weights(kept, asked)
        assert "teachers" not in kept.facts["distill"]  # it was not needed


@pytest.mark.parametrize("settings", [{}, {"offline": {"top_k": 4}}])
def test_packed_rows_are_taught_as_rows(train: Run, workshop: Path, settings: dict[str, Any]) -> None:
    teacher = trained(workshop, "causal_lm")
    alone = train("causal_lm", SGD, WHOLE, 4, distill=distil(teacher, **settings))
    packed = train("causal_lm", SGD, WHOLE, 4, distill=distil(teacher, **settings), data={"packing": True})
    assert_same_curves(packed, alone)


def test_hidden_states_of_packed_rows_count_their_own_tokens(train: Run, workshop: Path) -> None:
    settings = {"teacher_model_name_or_path": trained(workshop, "causal_lm"), "losses": [{"type": "hidden"}]}
    alone = train("causal_lm", SGD, WHOLE, 4, distill=settings)
    packed = train("causal_lm", SGD, WHOLE, 4, distill=settings, data={"packing": True})
    assert_same_curves(packed, alone)


@pytest.mark.parametrize("case", some(["causal_lm", "masked_lm", "seq2seq_bart"], "causal_lm"))
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_without_logits_the_loss_is_that_with_them(
    train: Run, workshop: Path, case: str, divergence: str
) -> None:
    settings = distil(trained(workshop, case), losses=[{"type": "logits", "divergence": divergence}])
    fused = train(case, SGD, WHOLE, 3, distill=settings)
    whole = train(case, SGD, WHOLE, 3, distill=settings, kernels="reference")
    told = next(iter(fused.facts["distill"]["logits"].values()))
    assert told.startswith("hidden states and head")
    assert_same_curves(fused, whole)
    assert_same_weights(fused, whole)


def test_several_teachers_count_by_their_weights(train: Run, workshop: Path) -> None:
    """The first step's loss by hand, in fp64: 0.4 × cross-entropy + 0.6 × (¼ KL(first) + ¾ KL(second))."""
    teachers = [trained(workshop, "single_label"), trained(workshop, "single_label", seed=12)]
    settings = {
        "teachers": [
            {"model_name_or_path": teachers[0], "weight": 1.0},
            {"model_name_or_path": teachers[1], "weight": 3.0},
        ],
        "alpha": 0.4,
        "temperature": 3.0,
    }
    found = train("single_label", SGD, WHOLE, 2, distill=settings).curve("loss")[0]
    made = recipe(workshop, CASES["single_label"], SGD, WHOLE, 2)
    stream = open_stream(made, workshop)
    rows = [int(row) for row in stream.window(0)]
    batch = stream.objective.collate([stream.dataset.table.row(row) for row in rows], rows)

    def logits(path: str) -> torch.Tensor:
        model = AutoModelForSequenceClassification.from_pretrained(path).double().eval()
        with torch.no_grad():
            return model(**batch.inputs).logits

    student = logits(str(workshop / "models" / "bert_single"))
    own = torch.nn.functional.cross_entropy(student, batch.targets["labels"])
    first, second = (logits(f"{path}/final") for path in teachers)
    kl = Divergence(temperature=3.0)
    taught = 0.25 * kl(student, first).mean() + 0.75 * kl(student, second).mean()
    assert apart(found, float(0.4 * own + 0.6 * taught)) <= 1e-5


def test_adapters_learn_from_a_teacher(workshop: Path) -> None:
    made = recipe(
        workshop, CASES["causal_lm"], {**ADAMW, "optim": {"learning_rate": 0.02}}, WHOLE, 10,
        distill=distil(trained(workshop, "causal_lm"), losses=[{"type": "logits"}, {"type": "hidden"}]),
        trainable={"adapters": [{"type": "lora", "r": 4, "target_modules": "all-linear"}]},
    ).model_copy(update={"run_name": "distil-lora"})  # fmt: skip
    run(made, workshop, Resume())
    rows = [
        json.loads(line) for line in (workshop / "runs/distil-lora/metrics.jsonl").read_text().splitlines()
    ]
    curve = [row["loss/distill_logits"] for row in rows if "loss" in row]
    assert curve[-1] < 0.8 * curve[0]


@pytest.mark.parametrize("strategy", some(["single", "ddp", "fsdp2"], "single"))
def test_a_resumed_run_ends_with_the_same_bits(workshop: Path, pools: Pools, strategy: str) -> None:
    """Projections are in the checkpoints, answers are drawn again; a checkpoint opens without the projections."""
    thin = {
        "init": "from_config",
        "config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    }
    many: dict[str, Any] = {"losses": [{"type": "logits"}, {"type": "hidden"}]}
    settings = distil(
        trained(workshop, "sft"), **(many if strategy != "ddp" else {"on_policy": {"max_new_tokens": 5}})
    )
    made = recipe(
        workshop, CASES["sft"], ADAMW, TWO, 6, model=thin, distill=settings,
        parallel={"strategy": strategy}, checkpoint={"save_steps": 3, "save_total_limit": None, "final": "last"},
    )  # fmt: skip
    whole = made.model_copy(update={"run_name": f"distil-whole-{strategy}"})
    again = made.model_copy(update={"run_name": f"distil-again-{strategy}"})

    def start(one: Any, how: Resume) -> None:
        if strategy == "single":
            run(one, workshop, how)
        else:
            pools[2].run(one, workshop, how)

    start(whole, Resume())
    runs = workshop / "runs"
    interrupted(runs / whole.run_name, runs / again.run_name, 3)
    start(again, Resume(resume=True))
    a, b = (read_result(runs / one.run_name).weights for one in (whole, again))
    assert a.keys() == b.keys()
    assert not any("extras" in name for name in a)
    for name, value in a.items():
        assert value.equal(b[name]), name
    if strategy == "single":
        opened = open_run(runs / whole.run_name, 6)  # the last one's weights, without the projections
        assert opened.model.state_dict()["lm_head.weight"].equal(a["lm_head.weight"])


@pytest.fixture(scope="session")
def unlike(workshop: Path) -> str:
    """A wider Llama with tokens of its own."""
    texts = [json.loads(line)["text"] for line in (workshop / "data" / "text.jsonl").read_text().splitlines()]
    tokenizer = byte_bpe([*texts[::3], *["other words entirely"] * 50], ["<pad>", "<eos>"], appends_eos=False)
    config = llama_config(len(tokenizer))
    config.hidden_size = 48
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(workshop / "models" / "unlike")
    tokenizer.save_pretrained(workshop / "models" / "unlike")
    return str(workshop / "models" / "unlike")


@pytest.mark.parametrize("case", some(["sft", "causal_lm"], "sft"))
def test_unlike_tokens_are_compared_where_the_texts_meet(
    train: Run, workshop: Path, unlike: str, case: str
) -> None:
    settings = {"teacher_model_name_or_path": unlike}
    whole = train(case, SGD, WHOLE, 3, distill=settings)
    assert 0 < whole.rows[0]["loss/distill_uld"] < 2
    for other in (
        train(case, SGD, ACCUMULATED, 3, distill=settings),
        train(case, SGD, RANKS, 3, distill=settings),
        train(case, SGD, WHOLE, 3, distill=settings, kernels="reference"),
    ):
        assert_same_curves(other, whole)
        assert_same_weights(other, whole)


def test_other_tokens_or_labels_are_refused_where_they_cannot_be_matched(
    train: Run, workshop: Path, unlike: str
) -> None:
    for settings, told in (
        ({"offline": {}}, "distill.offline: .* other tokens"),
        ({"on_policy": {}}, "distill.on_policy: .* other tokens"),
        ({"losses": [{"type": "logits", "divergence": "jsd"}]}, "compared by sorted probabilities"),
        ({"sequence_level": True}, "distill.sequence_level: teacher .* has other tokens"),
        ({"init": "first_k"}, "distill.init: teacher .* has other tokens"),
    ):
        with pytest.raises(UserError, match=told):
            train("sft", SGD, WHOLE, 1, distill={"teacher_model_name_or_path": unlike, **settings})
    with pytest.raises(UserError, match=r"has no label .* the data 4"):
        train("single_label", SGD, WHOLE, 1, distill=distil(str(workshop / "models" / "bert_single")))


@pytest.mark.parametrize(
    ("precision", "teacher"),
    [("bf16", {"dtype": "fp32"}), ("bf16", {"dtype": "bf16"}), ("fp32", {"quantization": "int8"})],
)
def test_a_teacher_computes_in_its_own_numbers(
    train: Run, workshop: Path, precision: str, teacher: dict[str, Any]
) -> None:
    """Few bits and 16 bits move the divergence by what they round, no more."""
    path = trained(workshop, "causal_lm")
    exact = train("causal_lm", SGD, WHOLE, 2, distill=distil(path))
    settings = {"teachers": [{"model_name_or_path": path, **teacher}], "temperature": 2.0}
    found = train("causal_lm", SGD, WHOLE, 2, distill=settings, training={"precision": precision})
    a, b = found.curve("loss/distill_logits")[0], exact.curve("loss/distill_logits")[0]
    assert 0 < apart(a, b) < 0.1


def test_a_row_that_is_seen_twice_is_taught_twice(train: Run, workshop: Path) -> None:
    sections: dict[str, Any] = {"model": {"dropout": 0.1}, "regularization": {"r_drop": {"alpha": 1.0}}}
    for settings in ({}, {"offline": {"top_k": 300}}):
        found = train(
            "single_label",
            SGD,
            WHOLE,
            2,
            distill=distil(trained(workshop, "single_label"), **settings),
            **sections,
        )
        assert set(found.facts["distill"]["terms"]) == {"distill_logits"}
        assert found.rows[0]["loss/r_drop"] > 0
