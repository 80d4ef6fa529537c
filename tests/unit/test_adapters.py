"""Adapters: every method on every family trains, leaves the base alone, is saved, loaded and merged."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.adapters.attach import Attached, attach
from tunesmith.adapters.merge import merge
from tunesmith.adapters.save import load, save
from tunesmith.adapters.state import entries, shapes
from tunesmith.errors import MachineError, UserError
from tunesmith.recipe.adapters import Adapter, Existing

ADAPTER: TypeAdapter[Adapter] = TypeAdapter(Adapter)
FAMILIES = {
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bert_single": "AutoModelForSequenceClassification",
    "bert_tags": "AutoModelForTokenClassification",
    "bert_qa": "AutoModelForQuestionAnswering",
    "bert_mlm": "AutoModelForMaskedLM",
}
LORA: dict[str, Any] = {"type": "lora", "r": 4, "lora_alpha": 8.0}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "rslora": LORA | {"use_rslora": True},
    "dora": LORA | {"use_dora": True},
    "loraplus": LORA | {"loraplus_lr_ratio": 16.0},
    "pissa": LORA | {"init_lora_weights": "pissa"},
    "pissa_niter": LORA | {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    "olora": LORA | {"init_lora_weights": "olora"},
    "ia3": {"type": "ia3"},
    "prompt_tuning": {"type": "prompt_tuning", "num_virtual_tokens": 3},
    "prefix_tuning": {"type": "prefix_tuning", "num_virtual_tokens": 3},
    "prefix_projection": {"type": "prefix_tuning", "num_virtual_tokens": 3, "prefix_projection": True},
    "p_tuning": {"type": "p_tuning", "num_virtual_tokens": 3},
}
HARD = {("olora", "gpt2")}  # refused by name
PROMPTS = ("prompt_tuning", "prefix_tuning", "prefix_projection", "p_tuning")
Base = Callable[[str], Any]


@pytest.fixture
def base(workshop: Path) -> Base:
    """base(family) → its tiny model, fresh."""

    def make(family: str) -> Any:
        kind = getattr(transformers, FAMILIES[family])
        return kind.from_pretrained(workshop / "models" / family).eval()

    return make


def put(model: Any, family: str, *settings: dict[str, Any], seed: int = 0, **options: Any) -> Attached:
    adapters = [ADAPTER.validate_python(one) for one in settings]
    return attach(model, adapters, FAMILIES[family], Path(), seed, **options)


def logits(model: Any, family: str) -> Tensor:
    """Of two rows, the second padded."""
    ids = torch.arange(14).reshape(2, 7) % 40 + 6
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if family == "t5":
        inputs["decoder_input_ids"] = ids[:, :4]
    if not family.startswith("bert"):
        inputs["use_cache"] = False
    found = model(**inputs, return_dict=True)
    return torch.stack([found.start_logits, found.end_logits], -1) if family == "bert_qa" else found.logits


def train(model: Any, family: str, steps: int = 4) -> list[float]:
    """Losses of SGD towards random logits."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    target, losses = None, list[float]()
    for _ in range(steps):
        found = logits(model, family)
        if target is None:
            target = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
        loss = (found - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).detach().abs().max()) <= tolerance * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_family(base: Base, tmp_path: Path, method: str, family: str) -> None:
    settings = METHODS[method]
    if (method, family) in HARD:
        with pytest.raises(UserError, match="Conv1D"):
            put(base(family), family, settings)
        return
    plain = logits(base(family), family).detach()
    attached = put(base(family), family, settings)
    model = attached.model
    assert attached.notes == []
    if method not in PROMPTS:  # begins as the base, PiSSA's and OLoRA's residual included
        assert close(logits(model, family), plain, 1e-5)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, family)
    assert losses[-1] < losses[0]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    unused = [n for n, p in parameters.items() if p.requires_grad and p.grad is None]
    assert unused == []

    trained = logits(model.eval(), family).detach()
    save(model, tmp_path, model.state_dict())
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert file
    assert all(value.numel() for value in file.values())
    heads = [name for name in file if name.endswith(("classifier.weight", "qa_outputs.weight"))]
    assert len(heads) == (family in ("bert_single", "bert_tags", "bert_qa"))
    again = put(base(family), family, settings)
    load(again.model, tmp_path)
    assert close(logits(again.model.eval(), family), trained, 1e-6)
    existing = put(base(family), family, {"type": "existing", "path": str(tmp_path), "trainable": False})
    assert close(logits(existing.model.eval(), family), trained, 1e-5)
    assert not any(p.requires_grad for p in existing.model.parameters())
    if method in PROMPTS:
        with pytest.raises(UserError, match="stands before the input"):
            merge(model)
    else:
        assert close(logits(merge(model), family), trained, 1e-5)


@pytest.mark.parametrize(
    "method", ["lora", "dora", "pissa", "ia3", "prompt_tuning", "p_tuning", "prefix_tuning"]
)
@pytest.mark.parametrize("family", ["llama", "bert_single", "t5"])
def test_peft_itself_loads_what_was_saved(base: Base, tmp_path: Path, method: str, family: str) -> None:
    from peft import PeftModel

    model = put(base(family), family, METHODS[method]).model
    train(model, family)
    save(model, tmp_path, model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = PeftModel.from_pretrained(base(family), str(tmp_path)).eval()
        found = logits(theirs, family)
    expected = logits(model.eval(), family)
    virtual = found.shape[1] - expected.shape[1] if found.dim() == 3 else 0
    assert close(found[:, virtual:], expected, 1e-5)


def test_the_forward_is_the_formula(base: Base) -> None:
    for settings, scale in ((LORA, 2.0), (LORA | {"use_rslora": True}, 4.0)):
        model = put(base("llama"), "llama", settings | {"init_lora_weights": "gaussian"}).model
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
        torch.nn.init.normal_(b)
        x = torch.randn(3, 32)
        assert torch.allclose(layer(x), x @ layer.base_layer.weight.T + scale * (x @ a.T) @ b.T, atol=1e-5)


def test_dora_learns_size_and_direction_apart(base: Base) -> None:
    model = put(base("gpt2"), "gpt2", METHODS["dora"]).model
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    weight = layer.base_layer.weight.T  # Conv1D's lies the other way round
    size = layer.lora_magnitude_vector.default.weight
    assert torch.allclose(size, weight.norm(dim=1), atol=1e-6)
    torch.nn.init.normal_(layer.lora_B.default.weight)
    torch.nn.init.uniform_(size, 1.0, 2.0)
    direction = weight + 2.0 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    x = torch.randn(3, 32)
    expected = x @ (size[:, None] * direction / direction.norm(dim=1, keepdim=True)).T + layer.base_layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-4)


def test_loraplus_names_every_b(base: Base) -> None:
    attached = put(base("gpt2"), "gpt2", METHODS["loraplus"])
    expected = {name for name, _ in attached.model.named_parameters() if ".lora_B." in name}
    assert len(expected) == 8
    assert attached.lr_scale == dict.fromkeys(expected, 16.0)


def test_pissa_is_the_base_in_two_parts(base: Base, tmp_path: Path) -> None:
    attached = put(base("llama"), "llama", METHODS["pissa"])
    assert attached.changes_base
    layer = attached.model.base_model.model.model.layers[0].self_attn.q_proj
    whole = base("llama").model.layers[0].self_attn.q_proj.weight
    product = 2.0 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    assert torch.allclose(layer.base_layer.weight + product, whole, atol=1e-6)
    _, s, _ = torch.linalg.svd(whole)
    assert torch.allclose(torch.linalg.svdvals(product)[:4], s[:4], atol=1e-5)
    save(attached.model, tmp_path, attached.model.state_dict())
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {v.shape[0] for n, v in file.items() if ".lora_A." in n} == {
        8
    }  # twice the rank, on the base as it was
    other = put(base("llama"), "llama", METHODS["pissa_niter"] | {"use_rslora": False})
    with pytest.raises(UserError, match="began otherwise"):
        load(other.model, tmp_path)


def test_the_seed_draws_the_adapters(base: Base) -> None:
    def drawn(seed: int) -> Tensor:
        torch.rand(3)  # whatever was drawn before
        model = put(base("llama"), "llama", LORA, seed=seed).model
        return model.base_model.model.model.layers[0].mlp.up_proj.lora_A.default.weight

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_a_head_drawn_at_random_is_trained_wherever_it_is(base: Base) -> None:
    model = base("bert_mlm")
    new = ["cls.predictions.transform.dense.weight", "cls.predictions.decoder.bias"]
    attached = put(model, "bert_mlm", LORA, new_weights=new)
    trained = [n for n, p in attached.model.named_parameters() if p.requires_grad and "modules_to_save" in n]
    assert [name.split(".modules_to_save")[0].rpartition("model.cls.")[2] for name in trained] == [
        "predictions.transform.dense"
    ] * 2
    assert attached.notes == [
        "cls.predictions.decoder.bias is new, and stays as it is: an adapter cannot hold it apart from its head"
    ]


@pytest.mark.parametrize("family", ["llama", "bert_single"])
def test_several_adapters_are_active_together(base: Base, tmp_path: Path, family: str) -> None:
    pair = [LORA | {"name": "one"}, LORA | {"name": "two", "r": 2}]
    model = put(base(family), family, *pair).model
    losses = train(model, family)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    trained = logits(model.eval(), family).detach()
    save(model, tmp_path, model.state_dict())
    again = put(base(family), family, *pair).model
    load(again, tmp_path)
    assert close(logits(again.eval(), family), trained, 1e-6)
    # the first as it is, the second further
    paths = [one | {"path": str(tmp_path / one["name"])} for one in pair]
    more = put(base(family), family, paths[0] | {"trainable": False}, paths[1]).model
    kept = {n: p.detach().clone() for n, p in more.named_parameters() if not p.requires_grad}
    assert any(".one." in name for name in kept)
    assert {n for n, p in more.named_parameters() if p.requires_grad} == {
        n for n in shapes(more) if ".two." in n
    }
    train(more, family)
    assert all(torch.equal(dict(more.named_parameters())[n], value) for n, value in kept.items())
    assert close(logits(merge(model), family), trained, 1e-5)


def test_continuing_keeps_the_folders_settings(base: Base, tmp_path: Path) -> None:
    model = put(base("llama"), "llama", LORA | {"r": 8}).model
    losses = train(model, "llama")
    save(model, tmp_path, model.state_dict())
    more = put(base("llama"), "llama", {"type": "lora", "path": str(tmp_path)})
    assert more.facts["adapters"][0]["trainable_parameters"] == more.facts["adapters"][0]["parameters"]
    assert train(more.model, "llama", 1)[0] < losses[-1]
    with pytest.raises(UserError, match=r"adapters\.r: is 3, but .* was trained with 8"):
        put(base("llama"), "llama", {"type": "lora", "r": 3, "path": str(tmp_path)})
    with pytest.raises(UserError, match="is of type LORA, not IA3"):
        put(base("llama"), "llama", {"type": "ia3", "path": str(tmp_path)})


def test_trained_rows_of_the_embedding(base: Base, tmp_path: Path) -> None:
    settings = LORA | {"trainable_token_indices": [7, 9]}
    before = base("gpt2")
    assert before.lm_head.weight is before.transformer.wte.weight
    model = put(base("gpt2"), "gpt2", settings).model
    train(model, "gpt2")
    trained = logits(model.eval(), "gpt2").detach()
    save(model, tmp_path, model.state_dict())
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert [tuple(v.shape) for n, v in file.items() if "token" in n] == [(2, 32)]
    again = put(base("gpt2"), "gpt2", settings).model
    load(again, tmp_path)
    assert close(logits(again.eval(), "gpt2"), trained, 1e-6)
    merged = merge(model)
    assert merged.lm_head.weight is merged.transformer.wte.weight
    changed = (merged.transformer.wte.weight != before.transformer.wte.weight).any(1).nonzero().flatten()
    assert changed.tolist() == [7, 9]
    assert close(logits(merged, "gpt2"), trained, 1e-5)


def test_tied_embeddings_trained_whole_stay_tied(base: Base, tmp_path: Path) -> None:
    def tied() -> Any:
        model = base("llama")
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    settings = LORA | {"modules_to_save": ["embed_tokens"]}
    model = put(tied(), "llama", settings).model
    train(model, "llama")
    trained = logits(model.eval(), "llama").detach()
    save(model, tmp_path, model.state_dict())
    again = put(tied(), "llama", settings).model
    load(again, tmp_path)
    assert close(logits(again.eval(), "llama"), trained, 1e-6)
    merged = merge(model)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert close(logits(merged, "llama"), trained, 1e-5)
    with pytest.raises(UserError, match=r"share a weight, which PEFT would part"):
        put(base("gpt2"), "gpt2", LORA | {"modules_to_save": ["wte"]})


def test_saving_reads_no_tensor_of_the_model(base: Base, tmp_path: Path) -> None:
    model = put(base("bert_single"), "bert_single", LORA).model
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():  # as ZeRO-3 leaves them
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    save(model, tmp_path, whole)
    found = load_file(tmp_path / "adapter_model.safetensors")
    names = entries(model, "default")
    assert found.keys() == names.keys()
    assert all(torch.equal(found[entry], whole[name]) for entry, name in names.items())
    with pytest.raises(MachineError, match="has no values for"):
        save(model, tmp_path, {name: torch.empty(0) for name in whole})


def test_a_file_of_something_else_is_refused(base: Base, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = put(base("llama"), "llama", LORA).model
    save(model, tmp_path, model.state_dict())
    path = tmp_path / "adapter_model.safetensors"
    right = load_file(path)
    first = next(iter(right))
    for tensors, message in (
        ({n: v for n, v in right.items() if n != first}, "lacks"),
        (right | {"more": torch.ones(1)}, "has more, which the model has not"),
        (right | {first: torch.ones(3, 3)}, r"has shape \(3, 3\)"),
    ):
        save_file(tensors, path)
        with pytest.raises(UserError, match=message):
            load(put(base("llama"), "llama", LORA).model, tmp_path)
    with pytest.raises(UserError, match="there is no adapter_model"):
        load(model, tmp_path / "nowhere")


def test_a_copy_of_a_prompt_model_is_its_own(base: Base) -> None:
    model = put(base("llama"), "llama", METHODS["prompt_tuning"]).model.eval()
    other = copy.deepcopy(model)
    before = logits(model, "llama")
    torch.nn.init.zeros_(other.prompt_encoder["default"].embedding.weight)
    assert torch.equal(logits(model, "llama"), before)
    assert not torch.equal(logits(other, "llama"), before)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "p_tuning"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_prompt_methods_generate_what_their_logits_say(base: Base, method: str, family: str) -> None:
    model = put(base(family), family, METHODS[method]).model.eval()
    prompts = [[11, 12, 13, 14, 15], [21, 22, 23]]
    ids, mask = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if family == "t5" else slice(5 - len(prompt), None)
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert found.shape == (2, 5 if family == "t5" else 9)
    for row, prompt in enumerate(prompts):
        text, answer = list(prompt), list[int]()
        for _ in range(4):
            source = torch.tensor([text])
            more = {"decoder_input_ids": torch.tensor([[0, *answer]])} if family == "t5" else {}
            scores = model(
                input_ids=source, attention_mask=torch.ones_like(source), use_cache=False, **more
            ).logits
            assert scores.shape[1] == (len(answer) + 1 if family == "t5" else len(text))
            scores[..., 1] = -torch.inf  # the end marker, which min_new_tokens keeps away
            answer.append(int(scores[0, -1].argmax()))
            text += [] if family == "t5" else answer[-1:]
        assert found[row, -4:].tolist() == answer


def test_a_text_begins_a_prompt(base: Base) -> None:
    def tokenizer(text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [5, 6]}

    settings = METHODS["prompt_tuning"] | {"prompt_tuning_init_text": "Answer:"}
    model = put(base("llama"), "llama", settings, tokenizer=tokenizer).model
    rows = model.base_model.model.embed_tokens.weight[[5, 6, 5]]
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, rows)
    with pytest.raises(UserError, match="has no tokens"):
        put(base("llama"), "llama", settings)


def test_a_decoders_classifier_reads_the_last_real_token(base: Base, workshop: Path) -> None:
    kind = transformers.AutoModelForSequenceClassification
    torch.manual_seed(0)
    decoder = kind.from_pretrained(workshop / "models" / "llama", num_labels=3).eval()
    attached = attach(decoder, [ADAPTER.validate_python(METHODS["prompt_tuning"])], "sequence", Path(), 0)
    long, short = torch.arange(10, 17)[None], torch.arange(10, 14)[None]
    padded = torch.cat([short, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    model = attached.model.eval()
    both = model(input_ids=torch.cat([long, padded]), attention_mask=mask).logits
    alone = model(input_ids=short, attention_mask=torch.ones_like(short)).logits
    assert close(both[1:], alone, 1e-5)
    assert any(".score." in n and p.requires_grad for n, p in model.named_parameters())


def test_existing_says_where(base: Base, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        attach(base("llama"), [Existing(type="existing", path="./nowhere")], "causal_lm", tmp_path, 0)
    with pytest.raises(UserError, match="holds no adapter"):
        attach(base("llama"), [Existing(type="existing", path=str(tmp_path))], "causal_lm", tmp_path, 0)
