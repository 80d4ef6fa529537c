"""What is frozen computes as in evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tunesmith.trainable.modes import settle_modes


def bert(**settings: Any) -> Any:
    config: Any = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    return hf.BertForSequenceClassification(hf.BertConfig(**config, num_hidden_layers=3, **settings))


def training(model: nn.Module) -> nn.Module:
    model.train()
    settle_modes(model)
    return model


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_nothing_frozen_changes_nothing() -> None:
    assert all(modes(training(bert())).values())


def test_units_without_a_trained_parameter() -> None:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    model.bert.encoder.layer[1].requires_grad_(False)
    model.bert.encoder.layer[1].output.LayerNorm.requires_grad_(True)
    found = modes(training(model))
    off = ("bert.embeddings", "bert.encoder.layer.0")
    for name, mode in found.items():
        assert mode != name.startswith(off), name
    model.eval()
    settle_modes(model)
    assert not any(modes(model).values())


def test_the_head_alone() -> None:
    model = bert()
    model.bert.requires_grad_(False)
    found = modes(training(model))
    assert {name for name, mode in found.items() if mode} == {"", "dropout", "classifier"}


def test_what_opens_drops_units_again() -> None:
    model = bert(hidden_dropout_prob=0.5)
    inputs = torch.arange(12).view(2, 6)
    model.bert.requires_grad_(False)
    training(model)
    first, second = (model.bert(inputs).last_hidden_state for _ in range(2))
    assert first.equal(second)
    model.bert.encoder.layer[2].requires_grad_(True)
    training(model)
    first, second = (model.bert(inputs).last_hidden_state for _ in range(2))
    assert not first.equal(second)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.layers = nn.ModuleList([nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)) for _ in range(2)])
        self.head = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        found = self.norm(self.stem(images))
        for layer in self.layers:
            found = layer(found)
        return self.head(found.mean((2, 3)))


def test_frozen_batch_norms_keep_their_statistics() -> None:
    model = Convolutional()
    model.stem.requires_grad_(False)
    model.norm.requires_grad_(False)
    frozen_norm: Any = model.layers[0][1]  # pyright: ignore[reportIndexIssue]
    frozen_norm.requires_grad_(False)
    training(model)
    model(torch.randn(4, 1, 8, 8))
    tracked = {
        name: int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")
    }
    assert tracked == {
        "norm.num_batches_tracked": 0,
        "layers.0.1.num_batches_tracked": 0,
        "layers.1.1.num_batches_tracked": 1,
    }


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_a_frozen_layer_above_a_trained_one_is_still_recomputed(family: str) -> None:
    """Without dropout (BART's own `training` decides on it), and with the gradient of a plain forward."""
    model: Any
    frozen: Any
    below: Any
    if family == "bert":
        model, inputs = (
            bert(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5),
            torch.arange(12).view(2, 6),
        )
        frozen, below = model.bert.encoder.layer, model.bert.embeddings.word_embeddings.weight
    else:
        config: dict[str, Any] = {
            "d_model": 8,
            "vocab_size": 20,
            "max_position_embeddings": 8,
            "dropout": 0.5,
        }
        for side in ("encoder", "decoder"):
            config |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 8}
        model = hf.BartForConditionalGeneration(hf.BartConfig(**config))
        inputs = torch.arange(12).view(2, 6)
        frozen, below = model.model.encoder.layers, model.model.shared.weight
    model.requires_grad_(False)
    below.requires_grad_(True)
    calls: list[bool] = []
    grads: list[Tensor] = []
    for recompute in (False, True):
        if recompute:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        training(model)
        inside = next(frozen[0].children())
        hook = inside.register_forward_pre_hook(lambda module, args: calls.append(frozen[0].training))
        torch.manual_seed(0)
        model(inputs, attention_mask=torch.ones_like(inputs)).logits.square().sum().backward()
        assert calls == [False] * (2 if recompute else 1)
        calls.clear()
        hook.remove()
        assert below.grad is not None
        grads.append(below.grad.clone())
        below.grad = None
    assert float((grads[0] - grads[1]).abs().max()) < 1e-6
    model.eval()
    settle_modes(model)
    model(inputs)
    assert not any(modes(model).values())
