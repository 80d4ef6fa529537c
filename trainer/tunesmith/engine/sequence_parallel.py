"""Sequence parallelism by exchange of heads (Jacobs et al. 2023, "DeepSpeed Ulysses"): each rank of a group holds a
slice of every sequence, and for attention all of the sequence for a part of the heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tunesmith.batch import IGNORED, Batch
from tunesmith.errors import UserError
from tunesmith.module import TrainModule

_NAME = "tunesmith_ulysses"
_KEY = "parallel.sequence_parallel_size"


class SequenceParallel:
    """One group of `size` ranks, of which this is `rank`."""

    def __init__(self, group: dist.ProcessGroup, pad_token_id: int) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.pad_token_id = pad_token_id

    def install(self, model: Any) -> None:
        """Makes the model's attention exchange. Raises UserError for a model that it would change."""
        from transformers import AttentionInterface

        _refuse(model, self.size)

        def attention(
            module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
            dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
        ) -> tuple[Tensor, None]:  # fmt: skip
            assert attention_mask is None, "a mask of a slice says nothing of the sequence"
            return self.attend(query, key, value, dropout, scaling), None

        AttentionInterface.register(_NAME, attention)
        self.exchange(model, on=True)

    def exchange(self, model: Any, *, on: bool) -> None:
        """Off for generation, which every rank does alone."""
        model.set_attn_implementation(_NAME if on else "sdpa")

    def part(self, batch: Batch) -> Batch:
        """This rank's slice of the sequences: `input_ids` and `position_ids` [rows, slice], labels where they are
        predicted. Causal attention needs no mask of the padding, which stands behind the rows. Rows and tokens are
        counted by the group's first rank."""
        ids, labels = batch.inputs["input_ids"], batch.targets["labels"]
        short = -ids.shape[1] % self.size
        ids = F.pad(ids, (0, short), value=self.pad_token_id)
        # the label of the next position is what this one predicts, also across the cut
        labels = F.pad(labels[:, 1:], (0, short + 1), value=IGNORED)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        width = ids.shape[1] // self.size
        own = slice(self.rank * width, (self.rank + 1) * width)
        first = self.rank == 0
        return replace(
            batch,
            inputs={"input_ids": ids[:, own], "position_ids": positions[:, own]},
            targets={"labels": labels[:, own]},
            rows=batch.rows if first else (),
            tokens=batch.tokens if first else 0,
            aligned=True,
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None
    ) -> Tensor:
        """query [rows, heads, slice, width], key and value [rows, key heads, slice, width] → [rows, slice, heads,
        width]. Key heads fewer than ranks are repeated first."""
        if key.shape[1] % self.size:
            repeats = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        query, key, value = (self._swap(tensor, 1, 2) for tensor in (query, key, value))
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return self._swap(out, 2, 1).transpose(1, 2).contiguous()

    def _swap(self, tensor: Tensor, cut: int, join: int) -> Tensor:
        return cast(Tensor, _AllToAll.apply(tensor, cut, join, self.group))


class _AllToAll(torch.autograd.Function):
    """Cuts a tensor along one dimension over the group and joins what comes along another; backward is the same
    with the two exchanged."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.way = cut, join, group
        return _exchange(tensor, cut, join, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        cut, join, group = ctx.way
        return _exchange(gradients[0], join, cut, group), None, None, None


def _exchange(tensor: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
    sent = torch.stack(tensor.chunk(dist.get_world_size(group), cut)).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(), join)


def _refuse(model: Any, size: int) -> None:
    """What a whole causal attention by sdpa would not be."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    if heads % size:
        raise UserError(f"{_KEY}: {size} does not divide the model's {heads} num_attention_heads")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds != {"full_attention"} or (window and getattr(config, "use_sliding_window", True)):
        raise UserError(f"{_KEY}: {type(model).__name__} has layers that see a part of the sequence only")
    soft = getattr(config, "attn_logit_softcapping", None)
    if soft or not model._can_set_attn_implementation():
        raise UserError(f"{_KEY}: the attention of {type(model).__name__} cannot be exchanged")


def share_sequences(module: TrainModule, world_size: int, size: int) -> SequenceParallel:
    """Lets `size` neighbouring ranks share each sequence. Raises UserError where they do not divide the world."""
    if world_size % size:
        raise UserError(f"parallel.sequence_parallel_size: {size} does not divide the {world_size} processes")
    groups = [list(range(first, first + size)) for first in range(0, world_size, size)]
    group, _ = dist.new_subgroups_by_enumeration(groups)
    shared = SequenceParallel(cast(dist.ProcessGroup, group), module.objective.tokenizer.pad_token_id)
    shared.install(module.model)
    return shared
