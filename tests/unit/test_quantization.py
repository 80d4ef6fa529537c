"""Quantised bases: what is quantised, how near it is, what training leaves alone, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from tunesmith import quantization
from tunesmith.errors import MissingExtra, UserError
from tunesmith.hub import resolve_path
from tunesmith.recipe.quantization import EightBit, FourBit, Quantization
from tunesmith.weights import Source

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

NF4, FP4, INT8 = FourBit(type="nf4"), FourBit(type="fp4"), EightBit(type="int8")
KINDS = [NF4, FourBit(type="nf4", double_quant=False), FP4, INT8]
CLASSES: dict[str, Any] = {
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
    "bert_mlm": AutoModelForMaskedLM,
    "bert_single": AutoModelForSequenceClassification,
}


def identify(settings: Quantization) -> str:
    return settings.type + ("" if getattr(settings, "double_quant", True) else "_single")


_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
_GPT2 = {"n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
_T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
_BERT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 32,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "gpt2": ("gpt2", _GPT2),
    "t5": ("t5", _T5),
    "bert_mlm": ("bert", _BERT),
    "bert_single": ("bert", {**_BERT, "num_labels": 4}),
}
_NO_DROPOUT = {
    "llama": {"attention_dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def save_tiny(folder: Path, name: str, **changed: Any) -> Path:
    """A model of 64-wide layers with weights of the size that a trained one has, biases and norms drawn too."""
    kind, fields = _CONFIGS[name]
    config = AutoConfig.for_model(kind, vocab_size=40, **{**_NO_DROPOUT[kind], **fields, **changed})
    model = CLASSES[name].from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and key.endswith("weight") else 0.0
            parameter.copy_(centre + 0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in CLASSES:
        save_tiny(root / name, name)
    return root


@pytest.fixture(scope="module")
def minilm() -> str:
    return resolve_path("builtin:minilm", Path())


def load(
    folder: Path | str,
    auto_class: Any,
    settings: Quantization | None,
    *,
    drawn: bool = False,
    compute_dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    found = AutoConfig.from_pretrained(folder, **config)
    path = None if drawn else str(folder)
    source = Source(auto_class, found, path, None, "sdpa", False, 7, settings, compute_dtype)
    model, _ = source.whole()
    return model.eval()


def tiny(models: Path, name: str, settings: Quantization | None, **options: Any) -> Any:
    return load(models / name, CLASSES[name], settings, **options)


def logits(model: Any, seed: int = 1) -> Tensor:
    ids = torch.randint(5, 30, (4, 16), generator=torch.Generator().manual_seed(seed))
    labels = {"labels": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **labels).logits


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def layers(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and quantization.is_quantized_parameter(module.weight)
    }


@pytest.mark.parametrize("settings", KINDS, ids=identify)
@pytest.mark.parametrize("drawn", [False, True], ids=["files", "drawn"])
@pytest.mark.parametrize("name", CLASSES)
def test_what_is_quantised_and_what_is_not(
    models: Path, name: str, drawn: bool, settings: Quantization
) -> None:
    plain, model = tiny(models, name, None, drawn=drawn), tiny(models, name, settings, drawn=drawn)
    kept = {
        "llama": {"lm_head"},
        "gpt2": {"lm_head"},
        "t5": {"lm_head", "wo"},  # which transformers keeps in fp32
        "bert_mlm": {"decoder", "dense"},
        "bert_single": {"classifier"},
    }
    about = quantization.facts(model)["quantization"]
    assert {one.rpartition(".")[2] for one in about["kept"]} == kept[name]
    assert about["type"] == settings.type
    assert about["modules"] == len(layers(model)) > 0
    # the rest is what it is without quantisation, bit for bit and trainable
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad is not quantization.is_quantized_parameter(parameter), key
        if parameter.requires_grad:
            assert torch.equal(parameter, plain.get_parameter(key)), key
    assert about["parameters"] == sum(plain.get_submodule(one).weight.numel() for one in layers(model))
    assert about["of_parameters"] == sum(p.numel() for p in plain.parameters())


# measured, least (bert) and most (t5): nf4 0.10 and 0.45, fp4 0.18 and 0.57, int8 0.010 and 0.032
@pytest.mark.parametrize("settings", KINDS, ids=identify)
@pytest.mark.parametrize("name", CLASSES)
def test_the_quantised_model_is_near_and_its_dequantised_one_equal(
    models: Path, name: str, settings: Quantization
) -> None:
    plain, model = tiny(models, name, None), tiny(models, name, settings)
    expected, found = logits(plain), logits(model)
    assert 1e-4 < relative(found, expected) < {"nf4": 0.5, "fp4": 0.65, "int8": 0.04}[settings.type]

    restored = quantization.dequantized(copy.deepcopy(model))
    assert relative(logits(restored), found) < 1e-5
    assert not quantization.is_quantized(restored)
    assert restored.state_dict().keys() == plain.state_dict().keys()
    # of normally distributed weights; half the widest gap between two values of nf4 is 0.152 of a block's largest
    share = {"nf4": 0.1, "fp4": 0.13, "int8": 0.01}[settings.type]
    widest = {"nf4": 0.155, "fp4": 0.17, "int8": 0.005}[settings.type]
    for key in (f"{one}.weight" for one in layers(model)):
        value = plain.state_dict()[key]
        off = restored.state_dict()[key] - value
        assert 0 < relative(restored.state_dict()[key], value) < share, key
        assert off.abs().max() <= value.abs().max() * widest, key


@pytest.mark.parametrize("name", ["gpt2", "bert_single"])
def test_a_dequantised_model_is_saved_as_a_plain_one(models: Path, tmp_path: Path, name: str) -> None:
    model = quantization.dequantized(tiny(models, name, NF4))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert any(isinstance(module, Conv1D) for module in model.modules()) == (name == "gpt2")
    reloaded, found = CLASSES[name].from_pretrained(tmp_path, output_loading_info=True)
    assert not (found["missing_keys"] | found["unexpected_keys"])
    assert torch.equal(logits(reloaded.eval()), logits(model))


@pytest.mark.parametrize("settings", KINDS, ids=identify)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_multiplies_by_what_its_bits_stand_for(
    models: Path, settings: Quantization, training: bool
) -> None:
    model = tiny(models, "bert_single", settings).train(training)
    weights = quantization.dequantized(copy.deepcopy(model))
    for name, layer in layers(model).items():
        x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(2)) * 10
        x.requires_grad_()
        y = layer(x)
        plain = weights.get_submodule(name)
        torch.testing.assert_close(y, x @ plain.weight.T + plain.bias, rtol=1e-5, atol=1e-4)
        y.square().sum().backward()
        torch.testing.assert_close(x.grad, 2 * y.detach() @ plain.weight, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(layer.bias.grad, 2 * y.detach().sum((0, 1)), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("autocast", [True, False])
def test_products_in_bf16_leave_the_bias_in_fp32(models: Path, autocast: bool) -> None:
    model = tiny(models, "bert_single", NF4, compute_dtype=torch.bfloat16)
    name, layer = next(iter(layers(model).items()))
    before = layer.bias.detach().clone()
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)  # as of a plain layer
    plain = quantization.dequantized(model).get_submodule(name)
    half = nn.functional.linear(x.bfloat16(), plain.weight.bfloat16(), before.bfloat16())
    assert torch.equal(y.float(), half.float())
    assert torch.equal(layer.bias, before)


def test_the_recipe_s_compute_dtype_wins_over_autocast(models: Path) -> None:
    model = tiny(models, "bert_single", FourBit(type="nf4", compute_dtype="fp32"))
    layer = next(iter(layers(model).values()))
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(2))
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), exact.bfloat16())


@pytest.mark.parametrize("settings", [NF4, INT8], ids=identify)
@pytest.mark.parametrize("name", CLASSES)
def test_adapters_train_on_a_base_that_keeps_its_bits(
    models: Path, name: str, settings: Quantization
) -> None:
    model = tiny(models, name, settings)
    model.activation_checkpointing_enable({"use_reentrant": False})
    before = quantization.fingerprint(model)
    targets = [one.rpartition(".")[2] for one in layers(model)]
    config = peft.LoraConfig(r=4, target_modules=sorted(set(targets)))
    torch.manual_seed(0)
    wrapped: Any = peft.get_peft_model(model, config)
    rest = {n: p.detach().clone() for n, p in wrapped.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(5, 30, (4, 16), generator=torch.Generator().manual_seed(3))
    labels = ids[:, 0] % 4 if name == "bert_single" else ids
    losses: list[float] = []
    for step in range(5):
        # an evaluation in between must not turn the weights into something that has no gradient
        wrapped.eval()
        with torch.no_grad():
            evaluated = wrapped(input_ids=ids, labels=labels).loss
        wrapped.train()
        loss = wrapped(input_ids=ids, labels=labels).loss
        assert relative(loss.detach(), evaluated) < 1e-6
        loss.backward()
        for parameter_name, parameter in wrapped.named_parameters():
            assert (parameter.grad is not None) == ("lora_" in parameter_name), parameter_name
        used = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n]
        assert all(bool(gradient.abs().sum() > 0) for gradient in used), step
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert quantization.fingerprint(model) == before
    assert all(torch.equal(wrapped.get_parameter(one), value) for one, value in rest.items())


def test_new_layers_stay_as_they_are(models: Path) -> None:
    # a masked language model's files have neither pooler nor classifier
    plain, model = (
        load(models / "bert_mlm", AutoModelForSequenceClassification, settings, num_labels=3)
        for settings in (None, NF4)
    )
    assert quantization.facts(model)["quantization"]["kept"] == ["bert.pooler.dense", "classifier"]
    for name in ("bert.pooler.dense", "classifier"):
        assert torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight)


def test_rows_of_broken_blocks_stay_as_they_are_in_4_bits(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama", intermediate_size=96)
    for settings, expected in (
        (NF4, ["lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1))]),
        (INT8, ["lm_head"]),
    ):
        model = load(folder, AutoModelForCausalLM, settings)
        assert quantization.facts(model)["quantization"]["kept"] == expected
    save_tiny(tmp_path / "narrow", "llama", hidden_size=32, intermediate_size=48)
    with pytest.raises(UserError, match="no linear layer whose inputs are a multiple of 64 left to quantise"):
        load(tmp_path / "narrow", AutoModelForCausalLM, NF4)


def test_skip_modules_go_by_the_ends_of_names(models: Path) -> None:
    settings = FourBit(type="nf4", skip_modules=["v_proj", "layers.0.mlp.up_proj"])
    kept = quantization.facts(tiny(models, "llama", settings))["quantization"]["kept"]
    assert kept == [
        "lm_head",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    ]


@pytest.mark.parametrize("entry", ["proj", "model", "embed_tokens", "1.v_proj"])
def test_an_entry_that_matches_nothing_is_an_error(models: Path, entry: str) -> None:
    with pytest.raises(UserError, match=f"skip_modules: '{entry}' matches no linear layer; .*v_proj"):
        tiny(models, "llama", FourBit(type="nf4", skip_modules=[entry]))


def test_nothing_left_to_quantise_is_an_error(models: Path) -> None:
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    with pytest.raises(UserError, match=r"has no linear layer whose .* left to quantise"):
        tiny(models, "llama", FourBit(type="nf4", skip_modules=every))


def test_weights_that_are_stored_quantised_are_refused(models: Path, tmp_path: Path) -> None:
    tiny(models, "llama", NF4).save_pretrained(tmp_path)
    for settings in (NF4, None):
        with pytest.raises(UserError, match="model_name_or_path: its weights are stored quantised"):
            load(tmp_path, AutoModelForCausalLM, settings)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"model.quantization needs bitsandbytes: .*\[bitsandbytes\]"):
        quantization.require()


def test_a_quantised_parameter_is_not_trained(models: Path) -> None:
    model = tiny(models, "llama", NF4)
    with pytest.raises(UserError, match=r"trainable: model.layers.0.self_attn.q_proj.weight is quantised"):
        quantization.refuse_trained(model.named_parameters())
    quantization.refuse_trained((n, p) for n, p in model.named_parameters() if "norm" in n)


def test_the_scales_are_the_state_dict_s_other_entries(models: Path) -> None:
    for settings in (NF4, INT8):
        model = tiny(models, "llama", settings)
        named = {*dict(model.named_parameters()), *dict(model.named_buffers())}
        assert quantization.scales(model) == model.state_dict().keys() - named


_PRINT_FINGERPRINT = """
from tests.unit.test_quantization import AutoModelForSequenceClassification, INT8, NF4, load, quantization
from tunesmith.hub import resolve_path
from pathlib import Path
path = resolve_path("builtin:minilm", Path())
for settings in (NF4, INT8):
    print(quantization.fingerprint(load(path, AutoModelForSequenceClassification, settings)))
"""


def test_the_bits_are_those_of_every_load_and_process(minilm: str) -> None:
    loaded = [load(minilm, AutoModelForSequenceClassification, settings) for settings in (NF4, INT8)]
    own = [quantization.fingerprint(model) for model in loaded]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    other = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PRINT_FINGERPRINT],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert other.stdout.split() == own, other.stderr
    assert len(set(own)) == 2
    # one bit more, and it is another
    next(iter(layers(loaded[0]).values())).weight.data[0] ^= 1
    assert quantization.fingerprint(loaded[0]) != own[0]


def test_quantisation_runs_in_one_thread(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional

    threads: list[int] = []
    original = bitsandbytes.functional.quantize_4bit

    def noting(*arguments: Any, **options: Any) -> Any:
        threads.append(torch.get_num_threads())
        return original(*arguments, **options)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", noting)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        tiny(models, "llama", NF4)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(threads) == {1}


# the bytes of a plain layer, and those of 4 bits: half a byte, a byte for 64, an fp32 for 64 × 256, and tables
@pytest.mark.parametrize(
    ("settings", "share"),
    [(NF4, 0.131), (KINDS[1], 0.142), (FP4, 0.131), (INT8, 0.253)],
    ids=["nf4", "nf4_single", "fp4", "int8"],
)
def test_bytes_of_a_real_base(minilm: str, settings: Quantization, share: float) -> None:
    model = load(minilm, AutoModelForSequenceClassification, settings)
    about = quantization.facts(model)["quantization"]
    assert about["kept"] == ["classifier"]
    assert 0.9 * share < about["bytes"] / (4 * about["parameters"]) < share
    for layer in layers(model).values():
        weight = layer.weight
        assert quantization.elements(weight) == layer.in_features * layer.out_features
        extra = quantization.stored_bytes(weight) - weight.numel() * weight.element_size()
        count = quantization.elements(weight)
        if settings is INT8:
            assert extra == 4 * layer.out_features
        elif settings is KINDS[1]:
            assert extra == 4 * count // 64 + 4 * 16
        else:
            blocks = count // 64
            assert extra == blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def test_real_sentences_keep_their_meaning(minilm: str) -> None:
    from transformers import AutoTokenizer

    sentences = [
        "My card has not arrived yet.",
        "Where is the card that I ordered?",
        "What is the exchange rate for euros?",
        "Somebody stole my phone, please block the account.",
    ]
    rows = AutoTokenizer.from_pretrained(minilm)(sentences, padding=True, return_tensors="pt")
    mask = rows["attention_mask"].unsqueeze(-1)

    def embed(settings: Quantization | None) -> Tensor:
        model = load(minilm, AutoModelForSequenceClassification, settings)
        with torch.no_grad():
            hidden = model.bert(**rows).last_hidden_state
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    plain = embed(None)
    # measured on 256 sentences of banking77, least of all: nf4 0.953, fp4 0.919, int8 0.999
    for settings, least in ((NF4, 0.94), (FP4, 0.9), (INT8, 0.998)):
        assert (embed(settings) * plain).sum(-1).min() > least, settings.type
