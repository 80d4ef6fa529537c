"""Stochastic depth, noisy embeddings and the dropout override: what they do to a model, by hand, and when."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    SwinConfig,
    XLNetConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.numerics import tiny_models
from tunesmith import drop_path
from tunesmith.compiling import compile_layers
from tunesmith.errors import UserError
from tunesmith.neftune import add_neftune, noise, sequence_lengths
from tunesmith.recipe.model import Model
from tunesmith.regularize import attach, configure, override_dropout

WORDS = 60
FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": lambda: AutoModelForSequenceClassification.from_config(tiny_models._bert(WORDS)),
    "gpt2": lambda: AutoModelForCausalLM.from_config(tiny_models._gpt2(WORDS)),
    "llama": lambda: AutoModelForCausalLM.from_config(tiny_models.llama_config(WORDS)),
    "t5": lambda: AutoModelForSeq2SeqLM.from_config(tiny_models._t5(WORDS)),
    "bart": lambda: AutoModelForSeq2SeqLM.from_config(tiny_models._bart(WORDS)),
}


def build(family: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family]()


def batch(model: Any, rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, WORDS, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    own = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": mask, **own}


# stochastic depth


class _Linear(GradientCheckpointingLayer):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width, dtype=torch.float64)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:
        return hidden_states + self.map(hidden_states), "more"


class _Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Linear(3) for _ in range(depth))
        self.config = tiny_models.llama_config(WORDS)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden, more = layer(hidden)
            assert more == "more"
        return hidden


def test_the_expectation_over_all_masks_is_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stack = _Stack(4)
    rates = drop_path.add_drop_path(stack, 0.6)
    assert rates == pytest.approx([0.15, 0.3, 0.45, 0.6])  # rate·l/L
    row = torch.randn(1, 5, 3, dtype=torch.float64)
    expected = stack.eval()(row)
    total = torch.zeros_like(row)
    for kept in itertools.product([False, True], repeat=4):
        weight = torch.tensor(rates)
        weight = torch.where(torch.tensor(kept), 1 - weight, weight).double().prod()
        draws = iter(0.999 if one else 0.0 for one in kept)
        monkeypatch.setattr(torch, "rand", lambda *s, draws=draws, **k: torch.full(s, next(draws)))
        total += weight * stack.train()(row)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)  # fp32 weights of the masks


def test_each_row_is_left_out_by_itself() -> None:
    torch.manual_seed(0)
    before, after = torch.randn(2000, 2, 3), torch.randn(2000, 2, 3)
    mixed = drop_path.leave_out(before, after, 0.25)
    out = (mixed == before).flatten(1).all(1)
    scaled = before + (after - before) / 0.75
    torch.testing.assert_close(mixed[~out], scaled[~out])
    assert 0.2 < out.float().mean().item() < 0.3


@pytest.mark.parametrize("family", FAMILIES)
def test_stochastic_depth_is_of_training_alone_and_leaves_the_model_as_it_is(family: str) -> None:
    plain, model = build(family), build(family)
    rates = drop_path.add_drop_path(model, 0.5)
    halves = [0.25, 0.5]
    assert rates == (halves * 2 if family in ("t5", "bart") else halves)
    assert list(model.state_dict()) == list(plain.state_dict())
    inputs = batch(model)
    assert torch.equal(model.eval()(**inputs).logits, plain.eval()(**inputs).logits)
    model.train(), plain.train()
    torch.manual_seed(2)
    first = model(**inputs).logits
    torch.manual_seed(2)
    assert torch.equal(first, model(**inputs).logits)
    assert not torch.equal(first, model(**inputs).logits)
    assert not torch.equal(first, plain(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_stochastic_depth_draws_once_under_gradient_checkpointing(family: str) -> None:
    gradients: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model = build(family).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        attach(model, Model(model_name_or_path="-", drop_path=0.5, neftune_noise_alpha=5.0))
        torch.manual_seed(3)
        cache = {} if family == "bert" else {"use_cache": False}
        model(**batch(model), **cache).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        assert (gradients[1][name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_stochastic_depth_stays_outside_of_the_layers_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, compiled = build("llama").train(), build("llama").train()
    for model in (plain, compiled):
        drop_path.add_drop_path(model, 0.5)
    # the graph is compiled as one, or fails; which code is made of it does not matter here
    inner = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: inner(f, backend="aot_eager", **options))
    assert compile_layers(compiled) == 2
    outputs: list[Tensor] = []
    for model in (plain, compiled):
        torch.manual_seed(4)
        outputs.append(model(**batch(model), use_cache=False).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_a_family_with_a_field_of_its_own_uses_it() -> None:
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    settings = Model(model_name_or_path="-", drop_path=0.3)
    configure(config, settings)
    model = AutoModelForImageClassification.from_config(config)
    assert config.drop_path_rate == 0.3
    assert max(attach(model, settings)["drop_path"]) == pytest.approx(0.3)
    assert not any(layer._forward_hooks for layer in model.modules() if type(layer).__name__ == "SwinLayer")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (AlbertConfig(vocab_size=9, embedding_size=4, hidden_size=4, num_attention_heads=2), "no stack"),
        (XLNetConfig(vocab_size=9, d_model=4, n_layer=2, n_head=2, d_inner=4), "no stack of layers"),
    ],
)
def test_a_model_whose_layers_cannot_be_left_out_is_refused(config: Any, reason: str) -> None:
    with pytest.raises(UserError, match=rf"model\.drop_path: .* has {reason}"):
        drop_path.add_drop_path(AutoModel.from_config(config), 0.1)


def test_layers_that_are_used_again_are_refused() -> None:
    stack = _Stack(1)
    with pytest.raises(UserError, match="has 1 layers for a depth of 2"):
        drop_path.add_drop_path(stack, 0.1)


# noisy embeddings


def test_the_noise_is_uniform_and_scaled_by_tokens_and_width() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([[4.0] * 500, [25.0] * 500, [0.0] * 500])
    drawn = noise(torch.empty(3, 500, 64), lengths, alpha=10.0)
    for row, length in ((0, 4), (1, 25)):
        bound = 10.0 / (length * 64) ** 0.5
        values = drawn[row]
        assert 0.999 * bound < values.abs().max().item() <= bound
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)  # of U(−b, b)
        assert values.mean().item() == pytest.approx(0.0, abs=0.01 * bound)
    assert not drawn[2].any()


def test_tokens_are_counted_without_padding_and_by_sequence() -> None:
    embedded = torch.empty(2, 6, 1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]])
    expected = torch.tensor([[3.0, 3, 3, 0, 0, 0], [0, 5, 5, 5, 5, 5]])
    assert torch.equal(sequence_lengths(mask, None, embedded), expected)
    packed = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    expected = torch.tensor([[3.0, 3, 3, 2, 2, 1], [6, 6, 6, 6, 6, 6]])
    assert torch.equal(sequence_lengths(None, packed, embedded), expected)
    assert torch.equal(sequence_lengths(None, None, embedded), torch.full((2, 6), 6.0))


def embedded_by(model: Any) -> list[Tensor]:
    """What the embedding gives, noise and all, is appended to the list at every forward."""
    seen: list[Tensor] = []
    base = model.base_model
    reader = base.encoder if model.config.is_encoder_decoder else base
    reader.get_input_embeddings().register_forward_hook(lambda m, a, output: seen.append(output.detach()))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_is_added_in_training_alone(family: str) -> None:
    plain, model = build(family), build(family)
    add_neftune(model, 5.0)
    inputs = batch(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    clean, noisy = embedded_by(plain), embedded_by(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, plain.eval()(**inputs).logits)
        if family != "bert":
            tokens = [m.generate(inputs["input_ids"][1:], max_new_tokens=3) for m in (plain, model)]
            assert torch.equal(*tokens)
        clean.clear(), noisy.clear()
        plain.train()(**inputs)
        for _ in range(2):
            torch.manual_seed(5)
            model.train()(**inputs)
    added = noisy[0] - clean[0]
    assert torch.equal(noisy[0], noisy[1])  # from the generator that the loop seeds
    width = added.shape[-1]
    assert not added[0, 6:].any()
    for row, length in ((0, 6), (1, 9)):
        bound = 5.0 / (length * width) ** 0.5
        assert 0.9 * bound < added[row, :length].abs().max().item() <= bound * 1.0001


def test_an_encoder_decoders_decoder_is_read_without_noise() -> None:
    model = build("t5").train()
    add_neftune(model, 5.0)
    seen: list[Tensor] = []
    decoder = model.decoder.get_input_embeddings()
    decoder.register_forward_hook(lambda m, a, output: seen.append(output.detach()))
    inputs = batch(model)
    model(**inputs)
    assert torch.equal(seen[0], decoder.weight[inputs["decoder_input_ids"]])


def test_noise_that_nothing_would_hear_is_refused() -> None:
    model = build("bert").train()
    add_neftune(model, 5.0)
    states = torch.randn(2, 4, 32)
    with pytest.raises(UserError, match=r"model\.neftune_noise_alpha: BertModel is trained without its own"):
        model(inputs_embeds=states)
    model.eval()(inputs_embeds=states)


# dropout


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dropout_override_arrives_in_the_modules(family: str) -> None:
    config = build(family).config
    names = override_dropout(config, 0.37)
    assert names
    assert not [name for name in names if "layerdrop" in name]
    auto = {
        "bert": AutoModelForSequenceClassification,
        "t5": AutoModelForSeq2SeqLM,
        "bart": AutoModelForSeq2SeqLM,
    }
    model = auto.get(family, AutoModelForCausalLM).from_config(config)
    rates = {type(m).__name__: m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    # what modules without a Dropout of their own pass to functional dropout, or to attention
    attributes = ("dropout", "attention_dropout", "activation_dropout", "dropout_rate")
    given = [getattr(m, name) for m in model.modules() for name in attributes if hasattr(m, name)]
    given = [value for value in given if isinstance(value, float)]
    assert rates or given
    assert set(rates.values()) | set(given) == {0.37}
    model.train()
    inputs = batch(model)
    torch.manual_seed(0)
    first = model(**inputs).logits
    assert not torch.equal(first, model(**inputs).logits)


def test_layerdrop_is_no_dropout() -> None:
    config = tiny_models._bart(WORDS)
    config.encoder_layerdrop = 0.05
    override_dropout(config, 0.4)
    assert (config.encoder_layerdrop, config.decoder_layerdrop) == (0.05, 0.0)
    assert config.dropout == config.attention_dropout == 0.4
