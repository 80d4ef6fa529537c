"""Noisy embeddings (`model.neftune_noise_alpha`; Jain et al. 2023, "NEFTune"): while it trains, each number of the
embedded tokens gets noise that is uniform in ±alpha/√(L·d), d the embedding's width and L the number of tokens of its
sequence.

L counts real tokens, as in the paper: not the padding, which would make a row's noise depend on the rows beside it,
and in a packed row each sequence by itself. (transformers' own NEFTune takes the padded length.) The noise goes to what
the backbone reads: in an encoder-decoder, the encoder's input. It is drawn from the default generator of the
embeddings' device, which the loop seeds for every micro-step, as dropout is."""

from __future__ import annotations

import inspect
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import UserError

_KEY = "model.neftune_noise_alpha"


class _Reading:
    """What the backbone was called with, while it runs; None: it does not, or does not train."""

    inputs: dict[str, Any] | None = None
    noisy: bool = False


def add_neftune(model: Any, alpha: float) -> None:
    """Hooks the embedding of the model's backbone (of its encoder, where it has a decoder too). Nothing is drawn
    outside of training. A training forward that reaches no such embedding raises UserError."""
    from transformers import PreTrainedModel

    base: Any = model.base_model
    inner = getattr(base, "encoder", None)
    reader: Any = inner if isinstance(inner, PreTrainedModel) else base
    embedding = reader.get_input_embeddings()
    if not isinstance(embedding, nn.Module):
        raise UserError(f"{_KEY}: {type(model).__name__} has no token embeddings: leave it out")
    signature = inspect.signature(reader.forward)
    reading = _Reading()

    # closures over one `reading`: adapters copy modules with their hooks, and the copies must see it too
    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reading.inputs, reading.noisy = None, False
        if module.training:
            reading.inputs = signature.bind_partial(*args, **kwargs).arguments | kwargs

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if reading.inputs is None:
            return None
        reading.noisy = True
        lengths = sequence_lengths(
            reading.inputs.get("attention_mask"), reading.inputs.get("position_ids"), output
        )
        return output + noise(output, lengths, alpha)

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if reading.inputs is not None and not reading.noisy:
            raise UserError(
                f"{_KEY}: {type(reader).__name__} is trained without its own embedding being read (an adapter that "
                "makes or replaces embeddings): leave it out"
            )
        reading.inputs = None

    reader.register_forward_pre_hook(begin, with_kwargs=True)
    embedding.register_forward_hook(add)
    reader.register_forward_hook(end)


def sequence_lengths(mask: Any, positions: Any, embedded: Tensor) -> Tensor:
    """The number of tokens of the sequence that each position belongs to: fp32 [rows, positions]; 0 at padding.
    `mask`: of the padding [rows, positions], or without one `positions` [rows, positions], which begin at 0 in every
    sequence of a packed row; without either all are one sequence."""
    rows, length = embedded.shape[:2]
    ones = torch.ones(rows, length, device=embedded.device)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask[:, -length:].to(ones)
        if real.shape != ones.shape:
            raise UserError(f"{_KEY}: the model's embeddings are not [rows, positions, width]: leave it out")
        return real * real.sum(1, keepdim=True)
    if isinstance(positions, Tensor) and positions.dim() == 2:
        sequence = (positions == 0).long().cumsum(1).expand(rows, length)
        counts = torch.zeros(rows, length + 1, device=ones.device).scatter_add_(1, sequence, ones)
        return counts.gather(1, sequence)
    return ones * length


def noise(embedded: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """Uniform in ±alpha/√(lengths·width), 0 where a length is 0: [rows, positions, width], in embedded's dtype."""
    scale = alpha / sqrt(embedded.shape[-1]) * torch.where(lengths > 0, lengths.clamp(min=1.0).rsqrt(), 0.0)
    drawn = torch.rand(embedded.shape, device=embedded.device).mul_(2.0).sub_(1.0)
    return (drawn * scale.unsqueeze(-1)).to(embedded.dtype)
