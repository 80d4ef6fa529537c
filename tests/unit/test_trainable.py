"""Which parameters the recipe's words, layers and patterns mean, on models of every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers as hf
from torch import nn

from tunesmith.errors import UserError
from tunesmith.trainable.select import parameters, select

SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def bert() -> Any:
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZES, vocab_size=20))


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=8))


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=20))


def t5() -> Any:
    config: Any = {
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 16,
        "num_heads": 2,
        "vocab_size": 20,
        "num_decoder_layers": 3,
    }
    return hf.T5ForConditionalGeneration(hf.T5Config(**config, num_layers=2))


def bart() -> Any:
    sizes: Any = {
        f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")
    }
    sizes |= {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    return hf.BartForConditionalGeneration(
        hf.BartConfig(d_model=8, vocab_size=20, max_position_embeddings=8, **sizes)
    )


def opt() -> Any:
    sizes: Any = {"ffn_dim": 16, "vocab_size": 20, "word_embed_proj_dim": 8, "max_position_embeddings": 8}
    return hf.OPTForCausalLM(hf.OPTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, **sizes))


def vit() -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=8, patch_size=4))


def resnet() -> Any:
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2])
    )


FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, set[str]]]] = {
    "bert": (bert, {
        "embeddings": {"bert.embeddings"}, "layer 0": {"bert.encoder.layer.0"}, "layer 1": {"bert.encoder.layer.1"},
        "what follows the layers": {"bert.pooler"}, "head": {"classifier"},
    }),
    "gpt2": (gpt2, {
        "embeddings": {"transformer.wte", "transformer.wpe"}, "layer 0": {"transformer.h.0"},
        "layer 1": {"transformer.h.1"}, "what follows the layers": {"transformer.ln_f"},
    }),
    "llama": (llama, {
        "embeddings": {"model.embed_tokens"}, "layer 0": {"model.layers.0"}, "layer 1": {"model.layers.1"},
        "what follows the layers": {"model.norm"}, "head": {"lm_head"},
    }),
    "t5": (t5, {
        "embeddings": {"shared"}, "layer 0": {"encoder.block.0", "decoder.block.0"},
        "layer 1": {"encoder.block.1", "decoder.block.1"}, "layer 2": {"decoder.block.2"},
        "what follows the layers": {"encoder.final_layer_norm", "decoder.final_layer_norm"},
    }),
    "bart": (bart, {
        "embeddings": {"model.shared", "model.encoder.embed_positions", "model.encoder.layernorm_embedding",
                       "model.decoder.embed_positions", "model.decoder.layernorm_embedding"},
        "layer 0": {"model.encoder.layers.0", "model.decoder.layers.0"},
        "layer 1": {"model.encoder.layers.1", "model.decoder.layers.1"},
    }),
    "opt": (opt, {
        "embeddings": {"model.decoder.embed_tokens", "model.decoder.embed_positions"},
        "layer 0": {"model.decoder.layers.0"}, "layer 1": {"model.decoder.layers.1"},
        "what follows the layers": {"model.decoder.final_layer_norm"},
    }),
    "vit": (vit, {
        "embeddings": {"vit.embeddings"}, "layer 0": {"vit.layers.0"}, "layer 1": {"vit.layers.1"},
        "what follows the layers": {"vit.layernorm"}, "head": {"classifier"},
    }),
    "resnet": (resnet, {
        "embeddings": {"resnet.embedder"}, "layer 0": {"resnet.encoder.stages.0"},
        "layer 1": {"resnet.encoder.stages.1"}, "head": {"classifier"},
    }),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_lies_in_its_part_of_the_model(family: str) -> None:
    build, parts = FAMILIES[family]
    model = build()
    found: dict[str, set[str]] = {}
    for one in parameters(model):
        found.setdefault(str(one.place), set()).add(one.name)
    assert found.keys() == parts.keys()
    for part, prefixes in parts.items():
        expected = {
            name
            for name, _ in model.named_parameters()
            if any(name.startswith(f"{prefix}.") for prefix in prefixes)
        }
        assert found[part] == expected, part


def names(model: nn.Module, text: str, **how: bool) -> set[str]:
    return {one.name for one in select(parameters(model), text, "trainable.freeze", **how)}


def test_words_on_bert() -> None:
    model = bert()
    every = {name for name, _ in model.named_parameters()}
    head = {"classifier.weight", "classifier.bias"}
    assert names(model, "all") == every
    assert names(model, "head") == head
    assert names(model, "backbone") == every - head
    assert names(model, "norms") == {name for name in every if "LayerNorm" in name}
    assert names(model, "biases") == {name for name in every if name.endswith(".bias")}
    assert names(model, "*.query.*") == {name for name in every if ".query." in name}


def test_layers_of_each_stack() -> None:
    """T5 with two encoder layers and three decoder layers."""
    model = t5()

    def stacks(text: str, **how: bool) -> set[str]:
        return {".".join(name.split(".")[:3]) for name in names(model, text, **how)}

    assert stacks("last 1 layers") == {"encoder.block.1", "decoder.block.2"}
    assert stacks("first 1", layers=True) == {"encoder.block.0", "decoder.block.0"}
    assert stacks("layers 1-2") == {"encoder.block.1", "decoder.block.1", "decoder.block.2"}
    with pytest.raises(UserError, match=r"trainable\.freeze: the model has 3 layers, fewer than asked for"):
        names(model, "last 4 layers")
    with pytest.raises(UserError, match=r"the model has layers 0 to 2, fewer"):
        names(model, "layers 3")


def test_a_tied_parameter_is_one_under_both_names() -> None:
    model = gpt2()
    assert names(model, "lm_head.*") == names(model, "transformer.wte.*") == {"transformer.wte.weight"}
    assert names(model, "head") == {"transformer.wte.weight"}
    assert names(model, "head") <= names(model, "embeddings")
    assert not names(model, "head") & names(model, "backbone")


def test_a_name_that_means_nothing_is_an_error_with_close_ones() -> None:
    with pytest.raises(UserError, match=r"'\*pooller\*' matches no parameter; did you mean '\*pooler\*'\?"):
        names(bert(), "*pooller*")
    with pytest.raises(UserError, match="matches no parameter"):
        names(resnet(), "norms.*")


def test_layers_that_cannot_be_told_apart_are_an_error() -> None:
    albert = hf.AlbertForMaskedLM(hf.AlbertConfig(**SIZES, vocab_size=20, embedding_size=4))
    with pytest.raises(UserError, match="no layers that can be told apart"):
        names(albert, "last 1 layers")
    assert any(".position_embeddings." in name for name in names(albert, "embeddings"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_inside_an_adapter_names_are_those_of_the_model() -> None:
    peft: Any = pytest.importorskip("peft")
    plain = bert()
    expected = {word: names(plain, word) for word in ("embeddings", "norms", "last 1 layers", "backbone")}
    model = peft.get_peft_model(
        plain, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "dense"])
    )
    known = parameters(model)
    for word, wanted in expected.items():
        found = {one.names[-1] for one in select(known, word, "trainable.unfreeze")}
        assert found == wanted, word
    assert not any("lora_" in one.name for one in select(known, "all", "trainable.unfreeze"))
    assert {one.name for one in select(known, "head", "trainable.unfreeze")} == {
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    }
    full = "base_model.model.bert.embeddings.word_embeddings.weight"
    for text in (full, "bert.embeddings.word_embeddings.*"):
        assert {one.name for one in select(known, text, "trainable.unfreeze")} == {full}
    with pytest.raises(UserError, match="names an adapter's parameters"):
        select(known, "*lora_A*", "trainable.freeze")
    adapters = select(known, "*lora_A*", "trainable.learning_rates", adapters=True)
    assert {str(one.place) for one in adapters} == {"layer 0", "layer 1", "what follows the layers"}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_virtual_tokens_lie_outside_the_model() -> None:
    peft: Any = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    known = {one.name: one for one in parameters(model)}
    prompt = known["prompt_encoder.default.embedding.weight"]
    assert prompt.adapter
    assert str(prompt.place) == "adapter"
    embedding = known["base_model.model.embed_tokens.weight"]
    assert str(embedding.place) == "embeddings"
    assert not embedding.adapter


def test_a_model_of_no_library() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert names(model, "norms") == {"1.weight", "1.bias"}
