"""Augmented runs: the same curve however the batch is split, bitwise when resumed, evaluations untouched; mixup and
cutoff against plain torch by hand; back-translations made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from objective_cases import (
    ACCUMULATED,
    CASES,
    RANKS,
    SGD,
    SHARDED,
    TWO,
    WHOLE,
    Layout,
    Run,
    assert_same_curves,
    assert_same_weights,
    open_stream,
    read_result,
    recipe,
)
from rank_pool import Pools
from tunesmith.batch import Batch
from tunesmith.data.augment.variants import prepare_variants
from tunesmith.embedding_noise.cutoff import Cutoff, uniform
from tunesmith.embedding_noise.hook import EmbeddingNoise, ways_of_reading
from tunesmith.embedding_noise.mixup import MixedTerm, mix, row_losses
from tunesmith.errors import UserError
from tunesmith.module import TrainModule
from tunesmith.recipe import augment as settings
from tunesmith.run import Resume, run

WORDS: list[dict[str, Any]] = [
    {"type": "token_drop", "fraction": 0.3},
    {"type": "token_insert", "fraction": 0.3},
]
MIXED: list[dict[str, Any]] = [{"type": "mixup", "alpha": 0.5, "probability": 0.8}]
SPAN: list[dict[str, Any]] = [{"type": "cutoff", "fraction": 0.3, "kind": "span"}]
TOKENS: list[dict[str, Any]] = [{"type": "cutoff", "fraction": 0.3}]
FEATURES: list[dict[str, Any]] = [{"type": "cutoff", "fraction": 0.3, "kind": "feature"}]
ALL = [*WORDS, *MIXED, *SPAN]
RUNS = {
    "single_label": ALL,
    "multi_label": MIXED,
    "regression": MIXED,
    "pairs": [*WORDS, *MIXED],
    "token_classification": [*WORDS, *TOKENS],
    "question_answering": [*WORDS, *TOKENS],
    "seq2seq_t5": [*WORDS, *SPAN],
    "seq2seq_bart": FEATURES,
    "sft": [*WORDS, *TOKENS],
    "causal_lm": TOKENS,
}


FAST = {"single_label", "regression", "question_answering"}


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in sorted(RUNS)]
)
def test_the_curve_does_not_see_the_micro_batch(train: Run, case: str) -> None:
    data = {**CASES[case].data, "augment": RUNS[case]}
    plain = train(case, SGD, WHOLE, 6, data=CASES[case].data)
    whole = train(case, SGD, WHOLE, 6, data=data)
    accumulated = train(case, SGD, ACCUMULATED, 6, data=data)
    assert whole.curve("loss") != plain.curve("loss")
    if case != "token_classification" and not case.startswith("seq2seq"):
        assert whole.curve("units") == plain.curve("units")
    assert_same_curves(accumulated, whole)
    assert_same_weights(accumulated, whole)
    assert [one["type"] for one in whole.facts["augment"]] == [one["type"] for one in RUNS[case]]


@pytest.mark.parametrize("case", ["single_label", pytest.param("sft", marks=pytest.mark.slow)])
def test_two_ranks_see_the_same_rows(train: Run, case: str) -> None:
    data = {**CASES[case].data, "augment": RUNS[case]}
    one, two = train(case, SGD, WHOLE, 6, data=data), train(case, SGD, RANKS, 6, data=data)
    assert_same_curves(two, one)
    assert_same_weights(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", sorted(SHARDED))
def test_mixed_and_cut_embeddings_in_shards(train: Run, strategy: str) -> None:
    data = {"augment": ALL}
    one = train("single_label", SGD, WHOLE, 6, data=data)
    two = train("single_label", SGD, TWO, 6, data=data, parallel=SHARDED[strategy])
    assert two.facts["engine"] == strategy
    assert_same_curves(two, one)
    assert_same_weights(two, one)


def test_a_resumed_run_is_bitwise_the_whole_one(workshop: Path) -> None:
    data = {"augment": ALL}
    steps = {"checkpoint": {"save_steps": 3, "final": "last"}, "data": data}
    made = recipe(workshop, CASES["single_label"], SGD, Layout(4), 6, **steps)
    whole = made.model_copy(update={"run_name": "augment-whole"})
    run(whole, workshop, Resume())
    again = made.model_copy(update={"run_name": "augment-resumed"})
    run(again, workshop, Resume())
    run(again, workshop, Resume(resume=str(workshop / "runs" / "augment-resumed" / "checkpoint-3")))
    found, expected = (read_result(workshop / "runs" / name.run_name) for name in (again, whole))
    assert found.curve("loss")[-3:] == expected.curve("loss")[-3:]
    assert all(value.equal(expected.weights[name]) for name, value in found.weights.items())


def test_evaluations_see_the_rows_as_they_are(
    train: Run, workshop_eval: dict[str, dict[str, object]]
) -> None:
    """With a learning rate of 0 the model is the same: so are its evaluations."""
    still = {**SGD, "optim": {**SGD["optim"], "learning_rate": 1e-30}}
    data = workshop_eval["single_label"]
    plain = train("single_label", still, WHOLE, 2, data=data)
    changed = train("single_label", still, WHOLE, 2, data={**data, "augment": ALL})
    assert changed.curve("loss") != plain.curve("loss")
    assert changed.evaluation["eval_loss"] == plain.evaluation["eval_loss"]
    assert changed.evaluation["eval_accuracy"] == plain.evaluation["eval_accuracy"]


@dataclass(frozen=True)
class Built:
    module: TrainModule
    batch: Batch
    model: Any


def built(workshop: Path, case: str, augment: list[dict[str, Any]]) -> Built:
    """A module in double precision without dropout, and a training batch of five rows."""
    made = recipe(workshop, CASES[case], SGD, Layout(5), 4, data={"augment": augment})
    stream = open_stream(made, workshop)
    model: Any = AutoModelForSequenceClassification.from_pretrained(workshop / "models" / CASES[case].model)
    model = model.double().eval()
    mixes = any(one["type"] == "mixup" for one in augment)
    changes: list[Any] = [mix] if mixes else []
    for number, one in enumerate(made.data.augment):
        if isinstance(one, settings.Cutoff):
            changes.append(Cutoff(one, number, tuple(stream.objective.tokenizer.all_special_ids), False))
    part = EmbeddingNoise(changes)
    part.attach(*ways_of_reading(model))
    own = MixedTerm if mixes else None
    module = TrainModule(model, stream.objective, "fp32", (), (part,), own)
    return Built(module, stream.batch([[row] for row in (3, 1, 4, 15, 9)], 0, 3), model)


def loss_of(made: Built) -> Tensor:
    found: Any = made.module(made.batch, "loss", torch.tensor([5.0], dtype=torch.float64))
    return found.total


@pytest.mark.parametrize("case", ["single_label", "multi_label", "regression"])
def test_mixup_by_hand(workshop: Path, case: str) -> None:
    """Every row by itself, from the embeddings of both texts, as the formula has it; and its gradient."""
    made = built(workshop, case, MIXED)
    batch, model = made.batch, made.model
    shares = batch.targets["partner/lambda"].double()
    assert 0 < int((shares < 1.0).sum()) <= 5
    embed = model.get_input_embeddings()
    total = torch.zeros((), dtype=torch.float64)
    for i, share in enumerate(shares):
        own = int(batch.targets["partner/own_mask"][i].sum())
        other = int(batch.targets["partner/attention_mask"][i].sum()) if share < 1.0 else own
        length = max(own, other)
        width = embed.weight.shape[1]
        mixed = torch.zeros(1, length, width, dtype=torch.float64)
        mine = nn.functional.embedding(batch.inputs["input_ids"][i, :own], embed.weight)
        theirs = nn.functional.embedding(batch.targets["partner/input_ids"][i, :other], embed.weight)
        mixed[0, :own] += share * mine
        if share < 1.0:
            mixed[0, :other] += (1 - share) * theirs
        kinds = batch.inputs["token_type_ids"][i : i + 1, :length]
        logits = model(inputs_embeds=mixed, token_type_ids=kinds).logits[0].float()
        labels = [batch.targets[name][i] for name in ("labels", "partner/labels")]
        total = total + sum(
            weight.float() * loss(case, logits, label)
            for weight, label in zip((share, 1 - share), labels, strict=True)
        )  # fmt: skip
    expected = total / 5
    found = loss_of(made)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(found, parameters, allow_unused=True),
        torch.autograd.grad(expected, parameters, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-8)


def loss(case: str, logits: Tensor, label: Tensor) -> Tensor:
    match case:
        case "single_label":
            return -logits.log_softmax(0)[label]
        case "multi_label":
            return F.binary_cross_entropy(logits.sigmoid(), label)
        case _:
            return (logits - label).square().mean()


def test_row_losses_add_up_for_any_term(workshop: Path) -> None:
    made = built(workshop, "multi_label", MIXED)
    (term,) = made.module.objective.terms
    outputs = {"logits": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), "hidden_states": None}
    outputs["logits"] = outputs["logits"][:, : made.batch.targets["labels"].shape[1]]
    each = row_losses(term, outputs, made.batch)
    assert each.shape == (5,)
    assert float(each.sum()) == pytest.approx(float(term(outputs, made.batch, torch.ones(()))), rel=1e-6)


@pytest.mark.parametrize("augment", [TOKENS, SPAN, FEATURES], ids=["token", "span", "feature"])
def test_cutoff_by_hand(workshop: Path, augment: list[dict[str, Any]]) -> None:
    asked = [{**augment[0], "probability": 1.0}]
    made = built(workshop, "single_label", asked)
    batch, model = made.batch, made.model
    tokenizer: Any = made.module.objective.tokenizer
    cut = Cutoff(settings.Cutoff.model_validate(asked[0]), 0, tuple(tokenizer.all_special_ids), False)
    embed = model.get_input_embeddings()
    hidden = cut.hidden(batch, embed.weight.shape[1])
    real = batch.inputs["attention_mask"].bool() & ~torch.isin(
        batch.inputs["input_ids"], torch.tensor(tokenizer.all_special_ids)
    )
    assert hidden.any()
    assert not hidden[~real].any()
    if asked[0].get("kind") == "span":
        for i in range(5):
            places = hidden[i, :, 0].nonzero().flatten()
            assert len(places) == max(1, round(0.3 * int(real[i].sum())))
            assert int(places[-1] - places[0]) == len(places) - 1
    if asked[0].get("kind") == "feature":
        assert all((hidden[i][real[i]] == hidden[i][real[i]][0]).all() for i in range(5))
    plain = nn.functional.embedding(batch.inputs["input_ids"], embed.weight)
    inputs = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
    logits = model(inputs_embeds=plain * ~hidden, **inputs).logits.float()
    expected = F.cross_entropy(logits, batch.targets["labels"])
    assert float(loss_of(made).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_the_hash_is_uniform_and_its_streams_apart() -> None:
    draws = torch.arange(2000, dtype=torch.int64) * 7919
    found = uniform(draws, 50, 0, 1)
    assert found.min() >= 0
    assert found.max() < 1
    assert float(found.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(found.var()) == pytest.approx(1 / 12, abs=0.002)
    for other in (uniform(draws, 50, 1, 1), uniform(draws, 50, 0, 2), found.roll(1, 0), found.roll(1, 1)):
        together = torch.stack([found.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(together)[0, 1])) < 0.02
    assert torch.equal(uniform(draws[5:6], 50, 0, 1)[0], found[5])


def test_a_forward_that_does_not_read_its_embedding_is_told(workshop: Path) -> None:
    made = built(workshop, "single_label", TOKENS)
    (part,) = made.module.parts
    with pytest.raises(UserError, match="without its own embedding being read"), part.around(made.batch):
        pass


BACK = {
    "type": "back_translation",
    "num_variants": 2,
    "num_beams": 2,
    "max_new_tokens": 24,
    "probability": 1.0,
}


def test_back_translations_are_made_once_and_drawn(
    train: Run, workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an untrained T5, whose translations are nonsense that differs from the text."""
    from tunesmith.data.augment import variants

    model = str(workshop / "models" / "t5")
    made = {"augment": [{**BACK, "model": model, "prefixes": ["there: ", "back: "]}]}
    monkeypatch.setattr(variants._Translator, "ends", staticmethod(lambda out, eos: [True] * len(out)))
    one = train("single_label", SGD, WHOLE, 4, data=made)
    assert one.curve("loss") != train("single_label", SGD, WHOLE, 4, data={}).curve("loss")
    counts = one.facts["data"]["train"]["back_translation"]
    assert counts["variants"] > 0
    assert counts["texts"] >= counts["texts_without"]

    def never(*args: Any) -> None:
        raise AssertionError("the cache has them")

    monkeypatch.setattr(variants, "_build", never)
    again = train("single_label", SGD, ACCUMULATED, 4, data=made)
    assert_same_curves(again, one)
    stream = open_stream(recipe(workshop, CASES["single_label"], SGD, WHOLE, 4, data=made), workshop)
    asked = settings.BackTranslation.model_validate(made["augment"][0])
    assert len(prepare_variants(asked, stream.dataset.table, torch.device("cpu"))) == len(stream.dataset)


@pytest.mark.parametrize("strategy", ["zero3", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_one_rank_translates_for_all(workshop: Path, pools: Pools, tmp_path: Path, strategy: str) -> None:
    """While the other waits for it: neither the translator nor its answers are shared out."""
    augment = [{**BACK, "model": str(workshop / "models" / "t5"), "max_new_tokens": 4}]
    made = recipe(
        workshop, CASES["single_label"], SGD, TWO, 2, data={"augment": augment, "cache_dir": str(tmp_path)},
        parallel={"strategy": strategy}, run_name=f"translated-{strategy}",
    )  # fmt: skip
    pools[2].run(made, workshop)
    found = read_result(workshop / "runs" / made.run_name).facts["data"]["train"]["back_translation"]
    assert found["texts"] > 0


def test_models_that_cannot_translate_are_told(workshop: Path) -> None:
    from tunesmith.data.augment.variants import check_models

    def asked(model: str) -> settings.BackTranslation:
        return settings.BackTranslation.model_validate({**BACK, "model": model})

    assert check_models(asked(str(workshop / "models" / "t5"))) == ["model t5"]
    with pytest.raises(UserError, match=r"data\.augment\.0\.model: .* is a bert, not a sequence-to-sequence"):
        check_models(asked(str(workshop / "models" / "bert_single")))
    with pytest.raises(UserError, match=r"data\.augment\.0\.model: there is no folder .*nowhere$"):
        check_models(asked(str(workshop / "nowhere")))
