"""The recipe's `trainable` section as a plan: what is trained from which step on, and how fast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from pydantic import TypeAdapter
from torch import nn

from tunesmith import optim, update
from tunesmith.errors import UserError
from tunesmith.recipe.optim import SGD, AdamW
from tunesmith.recipe.trainable import Trainable
from tunesmith.trainable import Plan, apply_trainable, counts, plan_trainable
from tunesmith.trainable.facts import group_facts
from tunesmith.trainable.plan import places, warmed_up


def bert(layers: int = 3) -> Any:
    config: Any = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    return hf.BertForSequenceClassification(hf.BertConfig(**config, num_hidden_layers=layers))


def planned(model: Any, total: int = 100, per_epoch: int = 10, scale: Any = None, **settings: Any) -> Plan:
    made = TypeAdapter(Trainable).validate_python(settings)
    return plan_trainable(model, made, 0.1, total, per_epoch, scale)


def opens(plan: Plan) -> dict[str, int]:
    """By place."""
    found = {(one.place, one.opens) for one in plan.parameters.values()}
    assert len(found) == len(dict(found)), "a place opens at once"
    return dict(found)


def factors(plan: Plan) -> dict[str, float]:
    return {one.place: one.factor for one in plan.parameters.values()}


def test_nothing_set_trains_all_from_the_start() -> None:
    model = bert()
    plan = planned(model)
    assert plan.parameters.keys() == {f"model.{name}" for name, _ in model.named_parameters()}
    assert {(one.opens, one.factor, one.warmup) for one in plan.parameters.values()} == {(0, 1.0, 0)}
    assert plan.openings == ()
    assert plan.notes == ()


def test_gradual_unfreezing_goes_from_the_top() -> None:
    plan = planned(bert(), unfreeze={"every": "1 epoch", "warmup_steps": 3})
    assert opens(plan) == {
        "head": 0, "what follows the layers": 10, "layer 2": 10, "layer 1": 20, "layer 0": 30, "embeddings": 40
    }  # fmt: skip
    assert plan.openings == (10, 20, 30, 40)
    assert [plan.stage(step) for step in (0, 9, 10, 39, 40)] == [0, 0, 1, 3, 4]
    assert plan.trained_at(9) == {"model.classifier.weight", "model.classifier.bias"}
    assert len(plan.trained_at(40)) == len(plan.parameters)
    assert {one.warmup for one in plan.parameters.values() if one.opens} == {3}
    said = plan.opening(20)
    assert said.startswith("step 21: layer 1 is trained from here, ")
    numel = sum(p.numel() for name, p in bert().named_parameters() if "layer.1." in name)
    assert said.endswith(f"{numel} parameters")


def test_gradual_in_pairs_and_by_shares_of_the_run() -> None:
    plan = planned(bert(), total=30, unfreeze={"every": 0.3, "layers": 2}, freeze=["norms"])
    found = opens(plan)
    assert found == {
        "head": 0, "what follows the layers": 9, "layer 2": 9, "layer 1": 9, "layer 0": 18, "embeddings": 27
    }  # fmt: skip
    assert not any("LayerNorm" in name for name in plan.parameters)


def test_what_gradual_unfreezing_does_not_reach_stays_frozen_and_is_told() -> None:
    model = bert()
    plan = planned(model, unfreeze={"every": 40}, freeze=["norms"])
    assert opens(plan) == {"head": 0, "what follows the layers": 40, "layer 2": 40, "layer 1": 80}
    assert plan.notes == (
        "trainable.unfreeze: the run ends before it reaches embeddings and layer 0: it stays frozen",
    )
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad
    with pytest.raises(UserError, match=r"every: 100 is after 100 steps, and the run has 100"):
        planned(bert(), unfreeze={"every": 100})


def test_moments_and_exceptions() -> None:
    plan = planned(
        bert(),
        freeze=["backbone"],
        unfreeze=[
            "*.pooler.*",
            {"at": 0.25, "layers": "last 1"},
            {"at": "3 epochs", "parameters": ["layers 0-1"]},
        ],
    )
    assert opens(plan) == {
        "head": 0, "what follows the layers": 0, "layer 2": 25, "layer 1": 30, "layer 0": 30
    }  # fmt: skip


def test_the_earliest_moment_counts() -> None:
    later = [
        {"at": 50, "parameters": ["all"], "warmup_steps": 7},
        {"at": 20, "layers": "first 1", "warmup_steps": 2},
    ]
    plan = planned(bert(), unfreeze=["head", *later], freeze=["head"])
    assert opens(plan)["layer 0"] == 20
    assert opens(plan)["layer 1"] == 50
    assert {one.warmup for one in plan.parameters.values() if one.opens == 20} == {2}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"freeze": ["all"]}, "no parameter is left to train"),
        ({"unfreeze": ["norms"]}, "'norms' has no effect: nothing has frozen it"),
        ({"unfreeze": [{"at": 100, "layers": "last 1"}]}, "100 is after 100 steps, and the run has 100"),
        ({"unfreeze": [{"at": "10 epochs", "layers": "last 1"}]}, "10 epochs is after 100 steps"),
        ({"unfreeze": [{"at": 9, "layers": "last 4"}]}, "the model has 3 layers, fewer than asked for"),
        ({"unfreeze": [{"at": 9, "parameters": ["all"]}]}, "nothing is trained in the first 9 steps"),
        (
            {"freeze": ["head"], "unfreeze": ["head", {"at": 9, "parameters": ["head"]}]},
            "'head' at 9 has no effect: it is trained before then",
        ),
        (
            {"unfreeze": [{"at": 9, "layers": "last 2"}, {"at": 12, "layers": "last 1"}]},
            "'last 1' at 12 has no effect",
        ),
        ({"freeze": ["backbone"], "unfreeze": {"every": 9}}, "nothing below the head is trained"),
        ({"freeze": ["backbone"], "layer_lr_decay": 0.9}, "layer_lr_decay: has no effect"),
        ({"learning_rates": {"head": 0.0}}, "a rate of 0 trains nothing"),
        ({"learning_rates": {"head": 0.1, "classifier.*": 0.2}}, "'head' has no effect: a later entry"),
        ({"freeze": ["head"], "learning_rates": {"head": 0.1}}, "'head' matches no parameter"),
        ({"freeze": ["*.quary.*"]}, r"'\*\.quary\.\*' matches no parameter; did you mean '\*\.query\.\*'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_has_no_effect_is_refused_by_name(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        planned(bert(), **settings)


def test_own_rates_need_a_rate_to_be_relative_to() -> None:
    settings = TypeAdapter(Trainable).validate_python({"learning_rates": {"head": 0.1}})
    with pytest.raises(UserError, match=r"optim\.learning_rate is 0"):
        plan_trainable(bert(), settings, 0.0, 100, 10)


def test_decay_once_per_layer_below_the_head() -> None:
    """BEiT's: the head and what follows the layers 1, the top layer the decay, the embeddings one layer below all."""
    assert factors(planned(bert(), layer_lr_decay=0.5)) == {
        "head": 1.0, "what follows the layers": 1.0, "layer 2": 0.5, "layer 1": 0.25, "layer 0": 0.125,
        "embeddings": 0.0625,
    }  # fmt: skip


def test_own_rates_replace_the_decay_and_adapters_multiply() -> None:
    scale = {"classifier.bias": 16.0, "bert.pooler.dense.bias": 2.0}
    plan = planned(
        bert(),
        scale=scale,
        layer_lr_decay=0.5,
        learning_rates={"embeddings": 0.02, "biases": 0.3, "head": 0.05},
    )
    found = {name.removeprefix("model."): one.factor for name, one in plan.parameters.items()}
    assert found["bert.embeddings.word_embeddings.weight"] == pytest.approx(0.2)
    assert found["bert.embeddings.LayerNorm.bias"] == pytest.approx(3.0), (
        "the last entry that names it counts"
    )
    assert found["classifier.weight"] == pytest.approx(0.5)
    assert found["classifier.bias"] == pytest.approx(0.5 * 16)
    assert found["bert.pooler.dense.bias"] == pytest.approx(3.0 * 2)
    assert found["bert.encoder.layer.2.output.dense.weight"] == pytest.approx(0.5)


def test_in_few_bits_nothing_can_be_unfrozen() -> None:
    model = bert()
    linear = model.bert.encoder.layer[0].output.dense
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    plan = planned(model)
    assert "model.bert.encoder.layer.0.output.dense.weight" not in plan.parameters
    with pytest.raises(UserError, match="held in few bits and cannot be trained"):
        planned(model, unfreeze=[{"at": 9, "layers": "first 1"}])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_with_adapters_the_model_is_frozen_but_for_what_unfreeze_names() -> None:
    peft: Any = pytest.importorskip("peft")

    def adapted() -> Any:
        return peft.get_peft_model(
            bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
        )

    lora = {f"model.{name}" for name, p in adapted().named_parameters() if p.requires_grad}
    assert planned(adapted()).parameters.keys() == lora
    plan = planned(adapted(), unfreeze=["*.pooler.*", {"at": 30, "layers": "last 1"}])
    own = {name: one.opens for name, one in plan.parameters.items() if name not in lora}
    assert {opened for name, opened in own.items() if "pooler" in name} == {0}
    assert {opened for name, opened in own.items() if "layer.2" in name} == {30}
    assert len(own) == 2 + 16
    with pytest.raises(UserError, match="'embeddings' has no effect: the adapters leave it frozen anyway"):
        planned(adapted(), freeze=["embeddings"])
    decayed = planned(adapted(), layer_lr_decay=0.5)
    assert {one.place: one.factor for name, one in decayed.parameters.items() if "lora_A" in name} == {
        "layer 0": 0.125, "layer 1": 0.25, "layer 2": 0.5
    }  # fmt: skip
    gradual = planned(adapted(), unfreeze={"every": 10})
    assert gradual.parameters.keys() == lora
    assert opens(gradual) == {"head": 0, "layer 2": 10, "layer 1": 20, "layer 0": 30}
    assert gradual.notes == ()


def test_without_the_steps_all_that_is_ever_trained_requires_a_gradient() -> None:
    model = bert()
    settings = TypeAdapter(Trainable).validate_python(
        {"freeze": ["backbone"], "unfreeze": [{"at": 100, "layers": "last 1"}]}
    )
    found = apply_trainable(model, settings)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "classifier" in n or "layer.2." in n}
    assert found == counts(model)
    assert found["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


# --- what the optimizer makes of it -------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def test_a_group_for_each_opening_and_rate() -> None:
    model = bert()
    plan = planned(model, layer_lr_decay=0.5, unfreeze={"every": 10, "layers": 2, "warmup_steps": 1})
    spec = optim.Spec(SGD(name="sgd", learning_rate=0.1, weight_decay=0.01), plan=plan)
    groups = optim.parameter_groups(Wrapped(model), spec)
    assert [(group["tag"], group["opens"], group["lr_scale"]) for group in groups] == [
        ("head, decay", 0, 1.0), ("head, no_decay", 0, 1.0),
        ("layer 1, decay", 10, 0.25), ("layer 1, no_decay", 10, 0.25),
        ("layer 2, decay", 10, 0.5), ("layer 2, no_decay", 10, 0.5),
        ("what follows the layers, decay", 10, 1.0), ("what follows the layers, no_decay", 10, 1.0),
        ("layer 0, decay", 20, 0.125), ("layer 0, no_decay", 20, 0.125),
        ("embeddings, decay", 30, 0.0625), ("embeddings, no_decay", 30, 0.0625),
    ]  # fmt: skip
    optimizer = optim.build(spec, groups)
    update.set_learning_rates(optimizer, 0.1, 10)
    found = {group["tag"]: group["lr"] for group in optimizer.param_groups}
    assert found["head, decay"] == 0.1
    assert found["layer 1, decay"] == pytest.approx(0.1 * 0.25 / 2)
    assert found["embeddings, decay"] == 0.0


def test_parts_that_are_trained_alike_share_a_group() -> None:
    model = bert()
    plan = planned(model, learning_rates={"head": 0.2})
    groups = optim.parameter_groups(Wrapped(model), optim.Spec(AdamW(name="adamw"), plan=plan))
    assert [group["place"] for group in groups[::2]] == [
        "embeddings and what follows the layers and layers 0-2", "head"
    ]  # fmt: skip


def test_groups_in_the_same_parts_are_told_apart_by_their_rates() -> None:
    model = bert()
    scale = {"classifier.bias": 16.0}
    plan = planned(model, scale=scale, freeze=["backbone"])
    groups = optim.parameter_groups(Wrapped(model), optim.Spec(AdamW(name="adamw"), plan=plan))
    assert [group["tag"] for group in groups] == ["head × 1, decay", "head × 16, no_decay"]


def test_the_reports_rows_cover_every_parameter_once() -> None:
    model = bert()
    plan = planned(model, freeze=["embeddings"], unfreeze=[{"at": 10, "layers": "last 1"}])
    spec = optim.Spec(AdamW(name="adamw", learning_rate=0.1, weight_decay=0.01), plan=plan)
    rows = group_facts(Wrapped(model), spec)
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
    assert [row["trained_from"] for row in rows] == [0, 0, 10, 10, None]
    frozen = rows[-1]
    assert frozen["tag"] == "frozen"
    assert frozen["stored"] == 4 * frozen["parameters"]
    assert {row["dtype"] for row in rows} == {"float32"}


def test_warm_up_of_its_own() -> None:
    assert [warmed_up(step, 5, 3) for step in (4, 5, 6, 7, 8, 9)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert warmed_up(0, 0, 0) == 1.0


def test_places_in_words() -> None:
    assert places(["layer 3", "layer 1", "layer 2", "layer 7", "layer 1"]) == "layers 1-3, 7"
    assert places(["embeddings", "layer 0"]) == "embeddings and layer 0"
