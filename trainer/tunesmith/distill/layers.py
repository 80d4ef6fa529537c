"""Which layer of the student is held against which of a teacher, and the matrices between their widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from tunesmith.errors import UserError
from tunesmith.recipe.distill import Map

Stack = Literal["", "encoder", "decoder"]


def depths(config: Any) -> dict[Stack, int]:
    """The number of layers of each stack."""
    text = config.get_text_config()
    if not config.is_encoder_decoder:
        return {"": int(text.num_hidden_layers)}
    encoder = getattr(config, "encoder_layers", None) or config.num_layers
    decoder = getattr(config, "decoder_layers", None) or config.num_decoder_layers
    return {"encoder": int(encoder), "decoder": int(decoder)}


def layer_map(asked: Map, student: int, teacher: int, *, first: int, key: str) -> dict[int, int]:
    """Student's layer → teacher's, from `first` (0: the embeddings' output, 1) to `student`; uniform: layer i to the
    layer round(i·teacher/student), so that the last meets the last. Raises UserError for a layer that is not there."""
    if asked == "uniform":
        return {i: (2 * i * teacher + student) // (2 * student) for i in range(first, student + 1)}
    for whose, layer, last in (
        *(("student", one, student) for one in asked),
        *(("teacher", one, teacher) for one in asked.values()),
    ):
        if not first <= layer <= last:
            raise UserError(f"{key}: the {whose} has no layer {layer}: write {first} to {last}")
    if not asked:
        raise UserError(f"{key}: is empty: write uniform, or {{student's layer: teacher's layer}}")
    return dict(sorted(asked.items()))


def width(config: Any) -> int:
    """Of the hidden states."""
    return int(config.get_text_config().hidden_size)


def heads(config: Any) -> int:
    return int(config.get_text_config().num_attention_heads)


def refuse_dropped_attention(config: Any) -> None:
    """The attention that transformers returns has dropout in it already. Raises UserError."""
    text = config.get_text_config()
    names = ["attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"]
    names += ["dropout_rate"] if text.model_type in ("t5", "mt5", "umt5") else []
    for name in names:
        if (value := getattr(text, name, 0.0)) and value > 0:
            raise UserError(
                f"distill.losses: attention is compared without dropout, but the student's {name} is {value}: set "
                "model.dropout: 0.0 (or this field in model.config)"
            )


def projections(layers: Mapping[str, tuple[int, int]], seed: int) -> dict[str, nn.Module]:
    """Name → (student's width, teacher's) → matrices without bias, drawn by the seed, from a normal distribution
    with the variance 1 / student's width."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, nn.Module] = {}
    for name, (inner, outer) in layers.items():
        linear = nn.Linear(inner, outer, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(outer, inner, generator=generator) / inner**0.5)
        found[name] = linear
    return found
