"""The head's stand-in: what models do with their logits is noted, and computed by the kernel; what it cannot be is
told, and the model's own logits are used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from torch import Tensor, nn

from tunesmith.batch import IGNORED, Batch
from tunesmith.fused_head import FusedHead, HeadOutput, NotFusable
from tunesmith.fusing import choose_head
from tunesmith.objectives import Objective
from tunesmith.recipe import Recipe
from tunesmith.recipe.load import load_recipe
from tunesmith.terms import TokenCrossEntropy

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
MADE: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "gemma2 (soft cap)": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0)
    ),
    "cohere (scale)": lambda: transformers.CohereForCausalLM(
        transformers.CohereConfig(**SMALL, logit_scale=0.3)
    ),
    "granite (divisor)": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**SMALL, logits_scaling=4.0)
    ),
    "phi (bias)": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SMALL)),
    "gpt2 (tied)": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    ),
    "bert (decoder's bias)": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})
    ),
}


def losses_of(model: nn.Module, ids: Tensor, head: FusedHead) -> tuple[Tensor, Tensor, Any]:
    """The loss from the model's own logits, the fused one, and the stand-in."""
    labels = ids.roll(-1, 1)
    own = cast(Any, model)(input_ids=ids).logits
    expected = F.cross_entropy(own.reshape(-1, own.shape[-1]), labels.reshape(-1), reduction="sum") / 7
    with head.standing_in():
        stand_in = cast(Any, model)(input_ids=ids).logits
    assert isinstance(stand_in, HeadOutput)
    return expected, stand_in.cross_entropy(labels, normalizer=torch.tensor(7.0)), stand_in


@pytest.mark.parametrize("name", MADE)
def test_the_fused_loss_is_that_of_the_models_own_logits(name: str) -> None:
    torch.manual_seed(0)
    model = MADE[name]().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    head = FusedHead(model.get_output_embeddings(), None)
    ids = torch.randint(1, 61, (2, 9))
    expected, fused, stand_in = losses_of(model, ids, head)
    assert fused.item() == pytest.approx(expected.item(), rel=2e-6)
    expected.backward()
    own = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fused.backward()
    for key, parameter in model.named_parameters():
        if key in own:
            apart = (parameter.grad - own[key]).norm() / own[key].norm().clamp_min(1e-12)
            assert apart <= 2e-5 or own[key].norm() < 1e-6, (key, apart)
    capped = "cap" in name
    assert stand_in.capped == capped
    assert "forward" not in vars(head.head), "the head is its own again"


def test_barts_bias_is_added() -> None:
    config = transformers.BartConfig(
        vocab_size=61, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    model.final_logits_bias.copy_(torch.randn(1, 61))
    expected, fused, stand_in = losses_of(
        model, torch.randint(3, 61, (2, 9)), FusedHead(model.get_output_embeddings(), None)
    )
    assert stand_in.extra is not None
    assert fused.item() == pytest.approx(expected.item(), rel=2e-6)


def test_the_shift_leaves_out_the_last_position() -> None:
    head = nn.Linear(8, 13)
    hidden, labels = torch.randn(2, 5, 8), torch.randint(0, 13, (2, 4))
    found = HeadOutput(head, None, hidden).cross_entropy(labels, normalizer=torch.tensor(1.0), shift=True)
    expected = F.cross_entropy(head(hidden)[:, :-1].reshape(-1, 13), labels.reshape(-1), reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=2e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda z: z * torch.tensor(2.0), "multiplied by a tensor"),
        (lambda z: z / torch.tensor(2.0), "divided by a tensor"),
        (lambda z: z + 1.0, "other than a constant bias"),
        (lambda z: (z * 2.0) + torch.zeros(13), "other than a constant bias"),
        (lambda z: z[:, :3], "a part of them is taken"),
        (lambda z: torch.tanh(torch.tanh(z)), "go through tanh"),
        (lambda z: torch.relu(z), "go through relu"),
        (lambda z: z.masked_fill(torch.ones(13).bool(), -1.0), "go through masked_fill"),
        (lambda z: torch.tanh(z) * -3.0, "capped at a negative"),
        (lambda z: z.sigmoid() * 2.0, "go through sigmoid"),
    ],
)
def test_what_the_kernel_cannot_do_is_told(change: Callable[[Any], Any], said: str) -> None:
    stand_in = change(HeadOutput(nn.Linear(8, 13), None, torch.randn(2, 5, 8)))
    with pytest.raises(NotFusable, match=said):
        stand_in.cross_entropy(torch.zeros(2, 5, dtype=torch.int64), normalizer=torch.tensor(1.0))


def test_it_has_no_attribute_that_a_tensor_has_not() -> None:
    stand_in = HeadOutput(nn.Linear(8, 13), None, torch.randn(2, 5, 8))
    assert not hasattr(stand_in, "ds_param_alias"), "by which DeepSpeed finds parameters among outputs"
    assert not isinstance(stand_in, Tensor)
    assert stand_in.shape == (2, 5, 13)


def test_scale_then_cap_then_scale() -> None:
    head, hidden = nn.Linear(8, 13), torch.randn(2, 5, 8) * 3
    labels = torch.randint(0, 13, (2, 5))

    def change(z: Any) -> Any:
        return 5.0 * torch.tanh(z * 0.5 / 4.0).float()

    found = change(HeadOutput(head, None, hidden)).cross_entropy(labels, normalizer=torch.tensor(1.0))
    expected = F.cross_entropy(change(head(hidden)).reshape(-1, 13), labels.reshape(-1), reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=2e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_focal_loss_of_tokens_is_that_of_the_logits(gamma: float) -> None:
    """By hand in fp64; the last position has no label."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 13), torch.randn(2, 5, 8) * 3
    labels = torch.randint(0, 13, (2, 5))
    labels[:, -1] = IGNORED
    batch = Batch({}, {"labels": labels}, (0, 1), 10)
    term = TokenCrossEntropy(focal_gamma=gamma)
    p = torch.softmax(head.double()(hidden.double()), -1)[:, :-1].gather(-1, labels[:, :-1, None])
    expected = (-((1 - p) ** gamma) * p.log()).sum() / 7.0
    weight = torch.autograd.grad(expected, head.weight)[0]
    head.float()
    for logits in (HeadOutput(head, None, hidden), head(hidden)):
        found = term({"logits": logits}, batch, torch.tensor(7.0))
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(found, head.weight)[0], weight.float(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_a_head_with_an_adapter_is_left_to_the_model(tmp_path: Path) -> None:
    """Its own weight is the frozen one: computed without the adapter, that would never train."""
    import peft

    recipe = load(tmp_path, "{type: causal_lm}", "text")
    terms = (TokenCrossEntropy(shift=True),)
    objective = cast(Any, type("Plain", (), {"predict": Objective.predict, "terms": terms})())
    model = MADE["llama"]()
    assert isinstance(choose_head(recipe, model, objective), FusedHead)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], r=2))
    found = choose_head(recipe, cast(Any, adapted), objective)
    assert isinstance(found, str)
    assert "not a plain Linear" in found


@pytest.mark.parametrize(
    ("kernels", "said"),
    [
        ("reference", "the recipe asks for it"),
        ("{linear_cross_entropy: reference}", "the recipe asks for it"),
    ],
)
def test_the_recipe_can_refuse(tmp_path: Path, kernels: str, said: str) -> None:
    recipe = load(tmp_path, "{type: causal_lm}", "text", f"kernels: {kernels}\n")
    assert choose_head(recipe, MADE["llama"](), cast(Any, None)) == said


def load(tmp_path: Path, objective: str, kind: str, more: str = "") -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(
        f"model: {{model_name_or_path: m}}\ndata: {{train: {{path: a.txt, format: {kind}}}}}\n"
        f"objective: {objective}\nrun_name: r\n{more}"
    )
    return load_recipe(path).recipe
