"""Heads of our own: pooling by hand, every backbone, what is loaded and drawn, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from tests.numerics import tiny_models
from tunesmith.engine.layers import transformer_layers
from tunesmith.errors import UserError
from tunesmith.heads.pooling import build_pooling
from tunesmith.model import Loaded, load_model, load_tokenizer
from tunesmith.objectives.base import Objective
from tunesmith.objectives.causal_lm import CausalLMObjective
from tunesmith.objectives.classification import ClassificationObjective
from tunesmith.objectives.question_answering import QuestionAnsweringObjective
from tunesmith.objectives.token_classification import TokenClassificationObjective
from tunesmith.recipe.model import Model
from tunesmith.recipe.objective import CausalLM, Classification, QuestionAnswering, TokenClassification
from tunesmith.recipe.trainable import Head

POOLINGS = ("cls", "mean", "max", "last", "attention")
BACKBONES = ("bert_mlm", "gpt2", "llama", "t5", "bart")
CAUSAL = ("gpt2", "llama")
LABELS = ["cold", "mild", "hot"]
TEXTS = ["a b c d e f g h", "b d", "h g f e d"]

Load = Callable[..., Loaded]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads")
    tiny_models.build_models(root, TEXTS * 20)
    return root


def classification(tokenizer: Any) -> Objective:
    objective = ClassificationObjective(Classification(type="classification"), tokenizer, 64, "cut")
    objective.load_state({"problem": "single_label", "labels": LABELS, "width": 3, "counts": {}})
    return objective


def tags(tokenizer: Any) -> Objective:
    objective = TokenClassificationObjective(
        TokenClassification(type="token_classification"), tokenizer, 64, "cut"
    )
    objective.load_state({"labels": ["O", "B-x", "I-x"]})
    return objective


def answers(tokenizer: Any) -> Objective:
    return QuestionAnsweringObjective(QuestionAnswering(type="question_answering"), tokenizer, 64, "cut")


@pytest.fixture
def load(models: Path) -> Load:
    def one(
        backbone: str,
        head: Head | None,
        objective: Callable[[Any], Objective] = classification,
        *,
        seed: int = 0,
        **settings: Any,
    ) -> Loaded:
        values = {"model_name_or_path": str(models / backbone), "attn_implementation": "sdpa"} | settings
        tokenizer = AutoTokenizer.from_pretrained(models / backbone)
        return load_model(
            Model.model_validate(values), models, objective(tokenizer), tokenizer, seed, head=head
        )

    return one


def inputs(models: Path, backbone: str, texts: list[str] = TEXTS) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(models / backbone)
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


# pooling


def pooled_by_hand(name: str, row: Any, module: Any) -> Any:
    """row [tokens, width], the real ones only, in fp64."""
    match name:
        case "cls":
            return row[0]
        case "last":
            return row[-1]
        case "mean":
            return row.mean(0)
        case "max":
            return row.max(0)
        case _:
            weight, bias = (p.detach().double().numpy() for p in module.projection.parameters())
            scores = np.tanh(row @ weight.T + bias) @ module.context.weight[0].detach().double().numpy()
            weights = np.exp(scores - scores.max())
            return (weights / weights.sum()) @ row


@pytest.mark.parametrize("side", ["right", "left", "middle"])
@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_sees_the_real_tokens_alone(name: str, side: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 9, 6)
    lengths = [9, 1, 4, 6]
    begin = {"right": lambda n: 0, "left": lambda n: 9 - n, "middle": lambda n: (9 - n) // 2}[side]
    real = torch.zeros(4, 9, dtype=torch.bool)
    for i, n in enumerate(lengths):
        real[i, begin(n) : begin(n) + n] = True
    # a padded position may hold anything, the largest and what is no number included
    hidden[~real] = torch.nan if name != "max" else 1e9
    module = build_pooling(name, 6)
    found = module(hidden, real).detach().double().numpy()
    for i in range(4):
        expected = pooled_by_hand(name, hidden[i][real[i]].double().numpy(), module)
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", POOLINGS)
def test_a_row_without_tokens_is_a_number_and_so_is_its_gradient(name: str, dtype: torch.dtype) -> None:
    hidden = torch.randn(2, 5, 4).to(dtype).requires_grad_()
    module = build_pooling(name, 4).to(dtype)
    found = module(hidden, torch.zeros(2, 5, dtype=torch.bool))
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    found.sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_the_mean_of_many_bf16_states_is_summed_in_fp32() -> None:
    hidden = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    # a sum in bf16 stops at 256
    assert build_pooling("mean", 1)(hidden, torch.ones(1, 4096, dtype=torch.bool)).item() == 1.0


# any backbone


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_with_every_pooling(load: Load, models: Path, backbone: str, pooling: Any) -> None:
    head = Head(hidden_layers=[24, 12], activation="tanh", pooling=pooling)
    if backbone in CAUSAL and pooling == "cls":
        with pytest.raises(UserError, match=r"trainable\.head\.pooling: cls: the first token of"):
            load(backbone, head)
        return
    model = load(backbone, head).model.eval()
    batch = inputs(models, backbone)
    with torch.no_grad():
        together = model(**batch, return_dict=True).logits
        assert together.shape == (3, 3)
        for i, text in enumerate(TEXTS):  # padding changes nothing
            alone = model(**inputs(models, backbone, [text])).logits[0]
            torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-5)
    model.train()
    # dropout would leave some weights of a tiny head without a gradient by chance
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = model(**batch, labels=torch.tensor([0, 1, 2])).loss
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(model(**batch).logits, torch.tensor([0, 1, 2]))
    )
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_backbone_has_the_checkpoints_weights_and_its_states(
    load: Load, models: Path, backbone: str
) -> None:
    model = load(backbone, Head(pooling="last")).model.eval()
    reference = AutoModel.from_pretrained(models / backbone).eval()
    expected = reference.state_dict()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, expected[name]), name
    batch = inputs(models, backbone)
    reader = reference.encoder if backbone == "t5" else reference
    states = reader(**batch).last_hidden_state
    length = batch["attention_mask"].sum(1) - 1
    torch.testing.assert_close(
        model(**batch).logits, model.head(states[torch.arange(3), length]), rtol=1e-5, atol=1e-6
    )


def test_barts_last_state_is_that_of_its_published_head(models: Path, load: Load) -> None:
    """Lewis et al. 2020: the row is read by both halves; the decoder's state at the end token is classified."""
    model = load("bart", Head(pooling="last", dropout=0.0)).model.eval()
    theirs = AutoModelForSequenceClassification.from_pretrained(models / "bart", num_labels=3).eval()
    batch = inputs(models, "bart")
    read: list[Any] = []
    theirs.classification_head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    theirs(**batch)
    torch.testing.assert_close(model(**batch).logits, model.head(read[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", [tags, answers])
@pytest.mark.parametrize("backbone", ["bert_mlm", "llama", "t5", "bart"])
def test_heads_on_every_token(load: Load, models: Path, backbone: str, objective: Any) -> None:
    model = load(backbone, Head(hidden_layers=[8]), objective).model.eval()
    batch = inputs(models, backbone)
    out = model(**batch, return_dict=True)
    shape = batch["input_ids"].shape
    if objective is tags:
        assert out.logits.shape == (*shape, 3)
        labels = torch.full(shape, -100)
        labels[:, 1] = 2
        expected = torch.nn.functional.cross_entropy(out.logits[:, 1], labels[:, 1])
        torch.testing.assert_close(model(**batch, labels=labels).loss, expected)
    else:
        assert out.start_logits.shape == out.end_logits.shape == shape
        ends = torch.tensor([0, 1, 1])
        expected = sum(torch.nn.functional.cross_entropy(x, ends) for x in (out.start_logits, out.end_logits))
        loss = model(**batch, start_positions=ends, end_positions=ends).loss
        torch.testing.assert_close(loss, expected / 2)
    assert not [name for name, _ in model.named_modules() if "pooling" in name or "pooler" in name]


def test_the_layers_of_the_head_are_those_of_the_recipe(load: Load) -> None:
    head = Head(hidden_layers=[7, 5], activation="silu", dropout=0.25, pooling="mean")
    layers = list(load("bert_mlm", head).model.head)
    assert [type(layer).__name__ for layer in layers] == [
        *("Dropout", "Linear", "SiLU"),
        *("Dropout", "Linear", "SiLU"),
        *("Dropout", "Linear"),
    ]
    widths = [(x.in_features, x.out_features) for x in layers if isinstance(x, torch.nn.Linear)]
    assert widths == [(32, 7), (7, 5), (5, 3)]
    assert {x.p for x in layers if isinstance(x, torch.nn.Dropout)} == {0.25}


@pytest.mark.parametrize(
    ("own", "overall", "expected"), [(None, None, 0.1), (None, 0.0, 0.0), (0.3, 0.0, 0.3)]
)
def test_the_heads_dropout_follows_the_models(
    load: Load, own: float | None, overall: float | None, expected: float
) -> None:
    model = load("bert_mlm", Head(dropout=own), dropout=overall).model
    assert model.head[0].p == expected
    assert model.config.head_dropout == expected


# what is drawn, and told


@pytest.mark.parametrize("settings", [{}, {"init": "from_config"}])
def test_the_seed_draws_the_head(load: Load, settings: dict[str, Any]) -> None:
    head = Head(hidden_layers=[8], pooling="attention")
    first, again, other = (load("bert_mlm", head, seed=seed, **settings) for seed in (1, 1, 2))
    a, b, c = (dict(one.model.named_parameters()) for one in (first, again, other))
    new = [name for name in a if not name.startswith("backbone.")]
    assert len(new) == 7
    for name in a:
        assert torch.equal(a[name], b[name]), name
    for name in new:
        assert torch.isfinite(a[name]).all()
        assert name.endswith("bias") or not torch.equal(a[name], c[name]), name
    if not settings:
        assert first.facts["new_weights"] == sorted(new)
        assert any(name.startswith("cls.predictions") for name in first.facts["unused_weights"])
    assert first.facts["head"] == {
        "hidden_layers": [8],
        "activation": "gelu",
        "dropout": 0.1,
        "pooling": "attention",
    }


def test_what_other_parts_ask_a_model(load: Load) -> None:
    model = load("llama", Head(pooling="last"), gradient_checkpointing=True).model
    assert model.base_model is model.backbone
    assert model.get_input_embeddings() is model.backbone.embed_tokens
    assert transformer_layers(model) == list(model.backbone.layers)
    assert all(layer.gradient_checkpointing for layer in model.backbone.layers)
    assert model.config.get_text_config().hidden_size == 32
    assert model.config._attn_implementation == model.backbone.config._attn_implementation == "sdpa"
    eager = load("llama", Head(pooling="last"), attn_implementation="eager").model
    assert eager.backbone.config._attn_implementation == "eager"


def test_bf16_autocast_makes_no_nan_of_a_row_of_padding(load: Load, models: Path) -> None:
    for pooling in POOLINGS:
        model = load("bert_mlm", Head(hidden_layers=[8], pooling=pooling)).model
        batch = inputs(models, "bert_mlm")
        batch["attention_mask"][1] = 0
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch).logits
        assert torch.isfinite(logits).all(), pooling
        logits.float().square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None), pooling


# final/


@pytest.mark.parametrize("tunesmith_first", [True, False])
def test_final_loads_in_a_fresh_process(
    load: Load, models: Path, tunesmith_first: bool, tmp_path: Path
) -> None:
    for backbone in BACKBONES:
        model = load(backbone, Head(hidden_layers=[8], pooling="attention")).model.eval()
        batch = inputs(models, backbone)
        model.save_pretrained(tmp_path / backbone)
        torch.save((batch, model(**batch).logits.detach()), tmp_path / backbone / "expected.pt")
    # whichever comes first, and with nothing of tunesmith's but its name
    imports = ["import tunesmith", "from transformers import AutoModelForSequenceClassification as Auto"]
    if not tunesmith_first:
        imports.reverse()
    program = f"""
{imports[0]}
{imports[1]}
import torch
for backbone in {BACKBONES}:
    batch, expected = torch.load(backbone + "/expected.pt")
    model, found = Auto.from_pretrained(backbone, output_loading_info=True)
    assert not any(found.values()), found
    assert type(model).__name__ == "TunesmithHeadForSequenceClassification"
    assert torch.equal(model.eval()(**batch).logits, expected), backbone
    assert model.config.id2label == {{0: "cold", 1: "mild", 2: "hot"}}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_tunesmith_imports_nothing_heavy() -> None:
    program = (
        "import sys, tunesmith; heavy = {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_head_of_ours_is_continued_or_replaced(load: Load, models: Path, tmp_path: Path) -> None:
    first = load("bert_mlm", Head(hidden_layers=[8], pooling="attention")).model
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.01)
    first.save_pretrained(tmp_path)
    where = {"model_name_or_path": str(tmp_path)}
    same = load("bert_mlm", None, **where)
    for name, value in first.state_dict().items():
        assert torch.equal(same.model.state_dict()[name], value), name
    assert "new_weights" not in same.facts
    other = load("bert_mlm", Head(hidden_layers=[4]), tags, **where)
    for name, value in first.backbone.state_dict().items():
        assert torch.equal(other.model.backbone.state_dict()[name], value), name
    assert other.model.config.text_config.model_type == "bert"
    assert other.facts["new_weights"] == ["head.1.bias", "head.1.weight", "head.4.bias", "head.4.weight"]
    assert "head.1.weight" in other.facts["unused_weights"]


# refused


@pytest.mark.parametrize("objective", [tags, answers])
def test_a_pooling_that_nothing_would_use_is_refused(load: Load, objective: Any) -> None:
    with pytest.raises(UserError, match=r"trainable\.head\.pooling: mean makes one vector of a row"):
        load("bert_mlm", Head(pooling="mean"), objective)


def test_a_language_model_has_no_head_to_replace(load: Load) -> None:
    def objective(tokenizer: Any) -> Objective:
        return CausalLMObjective(CausalLM(type="causal_lm"), tokenizer, 64, "cut")

    with pytest.raises(UserError, match=r"trainable\.head: is for classification"):
        load("llama", Head(), objective)


# learning


def test_minilm_learns_with_a_deep_head() -> None:
    settings = Model(model_name_or_path="builtin:minilm")
    tokenizer, _ = load_tokenizer(settings, Path())
    rows = [("the oven burns", 2), ("snow and ice", 0), ("a gentle breeze", 1), ("boiling water", 2)]
    rows += [("frozen lake", 0), ("spring morning", 1)]
    batch = dict(tokenizer([text for text, _ in rows], padding=True, return_tensors="pt"))
    labels = torch.tensor([label for _, label in rows])
    head = Head(hidden_layers=[64], pooling="attention")
    model = load_model(settings, Path(), classification(tokenizer), tokenizer, 0, head=head).model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    torch.manual_seed(0)
    losses: list[float] = []
    for _ in range(20):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(3), abs=0.1)
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
