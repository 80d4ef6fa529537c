"""Adapters: other methods of PEFT by name, what is refused and how it is said, and bases in few bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import TypeAdapter, ValidationError

from tunesmith.adapters.attach import attach
from tunesmith.adapters.loftq import lost
from tunesmith.adapters.merge import merge
from tunesmith.adapters.save import load, save
from tunesmith.errors import UserError
from tunesmith.recipe.adapters import Adapter

ADAPTER: TypeAdapter[Adapter] = TypeAdapter(Adapter)
LORA: dict[str, Any] = {"type": "lora", "r": 4, "lora_alpha": 8.0}
OTHERS: dict[str, dict[str, Any]] = {
    "VERA": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 4},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "HRA": {"r": 4},
    "LN_TUNING": {"target_modules": ".*norm"},
    "FOURIERFT": {"n_frequency": 20},
    "RANDLORA": {"r": 4},
    "MISS": {"r": 4},
    "DELORA": {"r": 4},
    "VBLORA": {"r": 4, "vector_length": 16, "num_vectors": 8, "topk": 2},
}


def llama(workshop: Path, folder: str = "llama") -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(workshop / "models" / folder).eval()


def widen(workshop: Path) -> str:
    """A Llama whose rows are whole blocks of 4-bit weights."""
    narrow, wide = workshop / "models" / "llama", workshop / "models" / "llama, wide"
    if not wide.exists():
        shutil.copytree(narrow, wide)
        config = transformers.LlamaConfig.from_pretrained(
            narrow, hidden_size=64, intermediate_size=128, head_dim=16
        )
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(wide)
    return wide.name


def put(model: Any, *settings: dict[str, Any], task: str = "causal_lm") -> Any:
    return attach(model, [ADAPTER.validate_python(one) for one in settings], task, Path(), 0)


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(14).reshape(2, 7) + 6, use_cache=False).logits


def step(model: Any) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    logits(model).square().mean().backward()
    torch.optim.SGD(trained, lr=0.01).step()


@pytest.mark.parametrize("kind", OTHERS)
def test_other_methods_train_are_saved_and_merged(workshop: Path, tmp_path: Path, kind: str) -> None:
    fields = {"target_modules": "all-linear"} | OTHERS[kind]
    settings = {"type": "peft", "peft_type": kind.lower(), "config": fields}
    attached = put(llama(workshop), settings)
    model, before = attached.model, logits(llama(workshop)).detach()
    assert attached.facts["adapters"][0]["trainable_parameters"] > 0
    step(model)
    trained = logits(model.eval()).detach()
    assert not torch.equal(trained, before)
    save(model, tmp_path, model.state_dict())
    again = put(llama(workshop), settings).model
    load(again, tmp_path)
    assert torch.allclose(logits(again.eval()), trained, atol=1e-5)
    assert torch.allclose(logits(merge(model)), trained, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "peft", "peft_type": "VERRA"}, "there is no VERRA; did you mean VERA"),
        (
            {"type": "peft", "peft_type": "ADALORA"},
            "ADALORA cannot be trained here: it moves rank between layers",
        ),
        ({"type": "peft", "peft_type": "IA3"}, "IA3 has a type of its own: type: ia3"),
        (
            {"type": "peft", "peft_type": "VERA", "config": {"rank": 3, "vera_droput": 0.1}},
            "VeraConfig has no rank",
        ),
        ({"type": "peft", "peft_type": "VERA", "config": {"vera_droput": 0.1}}, "did you mean vera_dropout"),
        (
            {"type": "peft", "peft_type": "LORA", "config": {"init_lora_weights": "eva"}},
            "looks at data before",
        ),
        (
            LORA | {"target_modules": ["q_prj"]},
            r"target_modules: the model has no q_prj; did you mean q_proj",
        ),
        (LORA | {"target_modules": ["q_proj", "query"]}, "the model has no query"),
        (LORA | {"target_modules": r"nothing\..*"}, "matches no module"),
        (LORA | {"target_modules": "("}, "is no regular expression"),
        (LORA | {"exclude_modules": ["quill"]}, "exclude_modules: the model has no quill"),
        (LORA | {"layers_to_transform": [1, 7]}, r"there is no layer 7 among .* \(layers: 0 to 1\)"),
        (
            LORA | {"modules_to_save": ["lm_haed"]},
            "modules_to_save: the model has no lm_haed; did you mean lm_head",
        ),
        (LORA | {"rank_pattern": {"nobody": 2}}, "rank_pattern: nobody is none of the modules"),
        (LORA | {"alpha_pattern": {"nobody": 2.0}}, "alpha_pattern: nobody is none of the modules"),
        (LORA | {"target_modules": ["norm"]}, "Target module LlamaRMSNorm"),
        (LORA | {"init_lora_weights": "orthogonal", "r": 3}, "even"),
        (LORA | {"init_lora_weights": "loftq"}, "it needs model.quantization: nf4"),
        (
            LORA | {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
            "cannot be saved for the base",
        ),
        (LORA | {"name": "model"}, "model is a name within the model"),
        (LORA | {"path": "./gone"}, "there is no folder ./gone"),
    ],
)
def test_what_is_refused_before_it_is_attached(
    workshop: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        put(llama(workshop), settings)
    assert str(error.value).startswith("trainable.adapters")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (({}, {}), "two are called default"),
        (({}, {"name": "b", "type": "ia3"}), "IA3 and LORA cannot be active together"),
        (
            ({}, {"name": "b", "init_lora_weights": "pissa"}),
            "changes the base that the other adapters stand on",
        ),
        (({"bias": "all"}, {"name": "b", "bias": "all"}), "only one adapter can train the base's biases"),
        (
            ({"modules_to_save": ["lm_head"]}, {"name": "b", "modules_to_save": ["lm_head"]}),
            "default and b both hold a lm_head",
        ),
    ],
)
def test_adapters_that_do_not_go_together(
    workshop: Path, pair: tuple[dict[str, Any], dict[str, Any]], message: str
) -> None:
    settings = [one if one.get("type") == "ia3" else LORA | one for one in pair]
    with pytest.raises(UserError, match=message):
        put(llama(workshop), *settings)


def test_prompts_and_encoder_decoders(workshop: Path) -> None:
    model = transformers.T5ForSequenceClassification.from_pretrained(workshop / "models" / "t5")
    with pytest.raises(UserError, match="works on an encoder-decoder for seq2seq alone"):
        put(model, {"type": "prompt_tuning"}, task="AutoModelForSequenceClassification")
    pair = [{"type": "prompt_tuning"}, {"type": "prompt_tuning", "name": "b"}]
    with pytest.raises(UserError, match="only one PROMPT_TUNING"):
        put(llama(workshop), *pair)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LORA | {"init_lora_weights": "piza"}, "there is no piza"),
        (LORA | {"name": "a.b"}, "pattern"),
        (LORA | {"target_modules": []}, "at least 1"),
        (LORA | {"trainable": False}, "nothing has trained"),
        (LORA | {"loraplus_lr_ratio": 4.0, "trainable": False, "path": "x"}, "no effect: trainable is false"),
        ({"type": "p_tuning", "encoder_dropout": 0.1}, "no effect on an MLP"),
        (
            {"type": "p_tuning", "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}
            | {"encoder_dropout": 0.1},
            "which has 1",
        ),
        ({"type": "prefix_tuning", "encoder_hidden_size": 8}, "prefix_projection is false"),
        ({"type": "existing"}, "the folder of the adapter"),
    ],
)
def test_settings_without_effect_are_errors_of_the_recipe(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_python(settings)


def test_an_encoder_that_was_not_saved_is_not_trained_on(workshop: Path, tmp_path: Path) -> None:
    model = put(llama(workshop), {"type": "p_tuning", "num_virtual_tokens": 3}).model
    save(model, tmp_path, model.state_dict())
    with pytest.raises(UserError, match=r"only what the encoder of .* made was saved"):
        put(llama(workshop), {"type": "existing", "path": str(tmp_path)})


def test_all_linear_and_layers(workshop: Path) -> None:
    facts = put(llama(workshop), LORA | {"layers_to_transform": [1], "exclude_modules": ["up_proj"]}).facts
    assert facts["adapters"][0]["targets"] == dict.fromkeys(
        ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "v_proj"), 1
    )
    gpt2 = transformers.GPT2LMHeadModel.from_pretrained(workshop / "models" / "gpt2")
    assert put(gpt2, LORA).facts["adapters"][0]["targets"] == {"c_attn": 2, "c_fc": 2, "c_proj": 4}
    some = put(llama(workshop), LORA | {"target_modules": r".*layers\.0\.self_attn\.[qk]_proj"}).facts
    assert some["adapters"][0]["targets"] == {"k_proj": 1, "q_proj": 1}


@pytest.mark.parametrize("init", [True, "loftq"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_merged_in_fp32(workshop: Path, kind: str, init: bool | str) -> None:
    pytest.importorskip("bitsandbytes")
    if (kind, init) == ("int8", "loftq"):
        return
    from tunesmith.quantized import is_quantized

    model = quantised(workshop, kind)
    attached = put(model, LORA | {"init_lora_weights": init})
    assert not attached.changes_base
    if init == "loftq":
        weights = dict(llama(workshop, widen(workshop)).named_parameters())
        for name, layer in attached.model.get_base_model().named_modules():
            if hasattr(layer, "lora_A"):
                loss = lost(layer, weights[f"{name}.weight"])
                made = 2.0 * layer.lora_B.default.weight @ layer.lora_A.default.weight
                left = torch.linalg.svdvals(loss)[4:].square().sum().sqrt()  # Eckart and Young
                assert torch.allclose((loss - made).norm(), left, rtol=1e-3)
    step(attached.model)
    trained = logits(attached.model.eval()).detach()
    merged = merge(attached.model)
    assert not is_quantized(merged)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    # int8 rounds the activations of the unmerged one too
    tolerance = 1e-4 if kind == "nf4" else 5e-2
    assert float((logits(merged) - trained).detach().abs().max()) < tolerance * float(trained.abs().max())


def quantised(workshop: Path, kind: str) -> Any:
    from tests.support import tiny_recipe
    from tunesmith.model import load_model, load_tokenizer
    from tunesmith.objectives import build_objective

    folder = workshop / "models" / widen(workshop)
    recipe = tiny_recipe(
        workshop / "quantised",
        model={
            "init": "pretrained",
            "config": {},
            "tokenizer": None,
            "model_name_or_path": str(folder),
            "quantization": {"type": kind},
        },
        trainable={"adapters": [LORA]},
    )
    tokenizer, _ = load_tokenizer(recipe.model, Path())
    objective = build_objective(recipe, tokenizer)
    return load_model(recipe.model, Path(), objective, tokenizer, 0, compute_dtype=torch.float32).model.eval()
