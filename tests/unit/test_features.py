"""What is kept of a backbone's output, what a head reads of it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from tests.unit.conftest import MakeRecipe
from tunesmith import optim
from tunesmith.data.prepare import Dataset, prepare
from tunesmith.engine.single import SingleEngine
from tunesmith.errors import UserError
from tunesmith.features import cache_features
from tunesmith.features.fields import Field, Taken
from tunesmith.features.refusals import refuse
from tunesmith.model import load_model
from tunesmith.module import TrainModule
from tunesmith.objectives import Objective, build_objective
from tunesmith.recipe import Recipe
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash

FROZEN = {"freeze": ["backbone"], "cache_features": True}


class Built:
    """A recipe's objects on one process; the backbone is frozen. `model`: another one in the place of the recipe's."""

    def __init__(self, recipe: Recipe, base: Path, model: nn.Module | None = None) -> None:
        self.recipe = recipe
        tokenizer, _ = tokenizer_for(recipe, base)
        self.objective: Objective = build_objective(recipe, tokenizer)
        self.datasets: dict[str, Dataset] = prepare(
            recipe.data, base, self.objective, tokenizer_hash(tokenizer)
        )
        self.model: Any = model or load_model(recipe.model, base, self.objective, tokenizer, 0).model
        if self.model.base_model is not self.model:
            self.model.base_model.requires_grad_(False)
        self.engine = SingleEngine(torch.device("cpu"))
        self.engine.prepare(
            TrainModule(self.model, self.objective, "fp32"), lambda device: None, optim.Spec.of(recipe)
        )

    def cache(self) -> dict[str, Any]:
        return cache_features(self.engine, self.recipe, self.objective, self.datasets)

    def refuse(self) -> None:
        refuse(self.recipe, self.engine, self.objective)


Build = Callable[..., Built]


@pytest.fixture
def build(workshop: Path, make_recipe: MakeRecipe, tmp_path: Path) -> Build:
    """build(case, other=None, **sections): `other` in the place of the model; the cache is the test's own."""

    def make(case: str, other: nn.Module | None = None, **sections: Any) -> Built:
        recipe = make_recipe(case, **{"trainable": FROZEN, **sections})
        data = recipe.data.model_copy(update={"cache_dir": str(tmp_path)})
        return Built(recipe.model_copy(update={"data": data}), workshop, other)

    return make


# a field


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("taken", "kept"), [("every", [0, 1, 2, 3, 4, 5]), ("first", [0, 2, 5]), ("last", [1, 4, 5])]
)
def test_tokens_to_rows_and_back(taken: Taken, kept: list[int], side: str) -> None:
    """Rows of 2, 3 and 1 tokens in a batch of 4 positions."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    mask = mask if side == "right" else mask.flip(1)
    value = torch.full((3, 4, 5), -1.0)
    value[mask] = torch.arange(6.0)[:, None].expand(6, 5)
    field = Field("last_hidden_state", taken, (5,), torch.float32)
    stored = field.pick(value, mask)
    assert stored[:, 0].tolist() == kept
    rows = list(stored.split([field.units(tokens) for tokens in (2, 3, 1)]))
    again = field.pad(rows, mask)
    assert again.shape == value.shape
    assert torch.equal(field.pick(again, mask), stored)
    assert float(again.abs().sum()) == 5 * sum(kept), "zero elsewhere"


def test_rows_to_rows_and_back() -> None:
    mask, value = torch.ones(3, 4).bool(), torch.arange(15.0).view(3, 5)
    field = Field("pooler_output", "row", (5,), torch.float32)
    assert torch.equal(field.pad(list(field.pick(value, mask).split(1)), mask), value)


# what a head reads


class _Head(BertPreTrainedModel):
    """A classifier whose logits are made of the backbone's output by `read`."""

    def __init__(self, config: BertConfig, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 1)
        self.read = read
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Any:
        states = self.bert(input_ids, attention_mask=attention_mask, **inputs)
        logits = self.classifier(self.read(states, attention_mask[..., None]))
        return SequenceClassifierOutput(logits=logits, hidden_states=states.hidden_states)


def _attention(states: Any, mask: Tensor) -> Tensor:
    scores = states.last_hidden_state.sum(-1, keepdim=True).masked_fill(mask == 0, -torch.inf)
    return (scores.softmax(1) * states.last_hidden_state).sum(1)


READERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "first token": (lambda states, _: states.last_hidden_state[:, 0], "first"),
    "mean": (lambda states, mask: (states.last_hidden_state * mask).sum(1) / mask.sum(1), "every"),
    "maximum": (
        lambda states, mask: states.last_hidden_state.masked_fill(mask == 0, -torch.inf).amax(1),
        "every",
    ),
    "attention": (_attention, "every"),
    "pooled": (lambda states, _: states.pooler_output, "row"),
}


def _head(build: Build, read: Callable[[Any, Tensor], Tensor], **config: Any) -> Built:
    plain = build("single_label").model.config
    torch.manual_seed(0)
    return build("single_label", other=_Head(BertConfig(**plain.to_dict() | config), read))


@pytest.mark.parametrize("reader", READERS)
def test_what_a_head_reads_is_what_is_kept(build: Build, reader: str) -> None:
    read, taken = READERS[reader]
    built = _head(build, read)
    kept = built.cache()["cached_features"]
    assert [how.split()[0] for how in kept.values()] == [taken]


def test_two_fields_are_kept_where_both_are_read(build: Build) -> None:
    built = _head(build, lambda states, _: states.pooler_output + states.last_hidden_state[:, 0])
    kept = built.cache()["cached_features"]
    assert {name: how.split()[0] for name, how in kept.items()} == {
        "last_hidden_state": "first",
        "pooler_output": "row",
    }


def test_states_of_all_layers_are_refused_where_they_are_read(build: Build) -> None:
    built = _head(build, lambda states, _: states.hidden_states[1][:, 0], output_hidden_states=True)
    with pytest.raises(UserError, match=r"cache_features: the head reads hidden_states of BertModel"):
        built.cache()


def test_states_of_all_layers_that_are_handed_through_are_no_obstacle(build: Build) -> None:
    built = _head(build, lambda states, _: states.pooler_output, output_hidden_states=True)
    assert list(built.cache()["cached_features"]) == ["pooler_output"]


def test_a_head_that_reads_the_padding_is_refused(build: Build) -> None:
    built = _head(build, lambda states, _: states.last_hidden_state.mean(1))
    with pytest.raises(UserError, match="the loss from the features is not the whole model's"):
        built.cache()


def test_a_row_that_no_table_has_is_no_row_of_the_cache(build: Build) -> None:
    built = build("single_label")
    built.cache()
    row = built.datasets["train"].table.row(0)
    row["input_ids"] = row["input_ids"][::-1]
    with pytest.raises(AssertionError, match="no table of the run"):
        built.engine.forward(built.objective.collate([row], [0]), "predict")


# the key of the cache


def computed(built: Built) -> int:
    return built.cache()["cached_features_computed_rows"]


def test_what_is_there_is_not_computed_again(build: Build) -> None:
    first, second = build("single_label"), build("single_label")
    # another head, other dropout, another number of epochs: the same backbone
    with torch.no_grad():
        second.model.classifier.weight.add_(1.0)
    second.model.config.classifier_dropout = 0.5
    assert computed(first) == sum(len(data) for data in first.datasets.values())
    assert computed(second) == 0


def test_another_weight_is_another_cache(build: Build) -> None:
    first, second = build("single_label"), build("single_label")
    with torch.no_grad():
        second.model.base_model.embeddings.LayerNorm.bias[0] += 1e-6
    assert computed(first) == computed(second) > 0


def test_another_precision_is_another_cache(build: Build) -> None:
    first, second = build("single_label"), build("single_label")
    second.engine.train_module.precision = "bf16"
    assert computed(first) == computed(second) > 0


def test_another_length_is_another_cache(build: Build) -> None:
    first, second = build("single_label"), build("single_label", data={"max_length": 6})
    assert computed(first) == computed(second) > 0


# refusals


def test_a_setting_of_the_backbone_that_has_no_effect_is_refused(build: Build) -> None:
    built = build("single_label", model={"gradient_checkpointing": True})
    with pytest.raises(
        UserError, match=r"^trainable\.cache_features: model\.gradient_checkpointing has no effect"
    ):
        built.refuse()


def test_rows_that_are_drawn_anew_are_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build("single_label")
    monkeypatch.setattr(type(built.objective), "draw", lambda self, row, key: row)
    with pytest.raises(UserError, match="draws each row anew in every epoch"):
        built.refuse()


def test_a_model_without_a_head_is_refused(build: Build) -> None:
    plain = build("single_label").model.base_model
    with pytest.raises(UserError, match="BertModel has no backbone beneath its head"):
        build("single_label", other=plain.requires_grad_(True)).refuse()


def test_a_trained_parameter_of_the_backbone_is_refused_by_name(build: Build) -> None:
    built = build("single_label")
    built.model.bert.pooler.requires_grad_(True)
    with pytest.raises(
        UserError, match=r"bert\.pooler\.dense\.weight \(and 1 more\) of the backbone is trained"
    ):
        built.refuse()


def test_an_engine_that_shards_is_refused_by_name(build: Build) -> None:
    built = build("single_label", parallel={"strategy": "zero3"})
    built.engine.sharded = True
    with pytest.raises(UserError, match=r"parallel\.strategy: zero3 .*use ddp, zero1 or zero2"):
        built.refuse()
