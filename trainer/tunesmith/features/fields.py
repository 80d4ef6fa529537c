"""A field of a backbone's output, between the padded batch and the rows on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

Taken = Literal["row", "first", "last", "every"]


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of the output: [rows, *inner] where `taken` is row, else [rows, positions, *inner], of which the
    head reads the row's first token, its last, or every one. On disk a row is [units, *inner]."""

    name: str
    taken: Taken
    inner: tuple[int, ...]
    dtype: torch.dtype

    def units(self, tokens: int) -> int:
        """Of a row of so many tokens."""
        return tokens if self.taken == "every" else 1

    @property
    def unit_bytes(self) -> int:
        return prod(self.inner) * self.dtype.itemsize

    def _places(self, mask: Tensor) -> Tensor:
        """Which positions are kept: bool [rows, positions], as the mask is."""
        match self.taken:
            case "first":
                return mask & (mask.cumsum(1) == 1)
            case "last":
                return mask & (mask.flip(1).cumsum(1).flip(1) == 1)
            case _:
                return mask

    def pick(self, value: Tensor, mask: Tensor) -> Tensor:
        """What is stored of a batch, [units of all rows, *inner] in the order of the rows. mask: bool [rows,
        positions], False at padding, on either side."""
        return value if self.taken == "row" else value[self._places(mask)]

    def pad(self, rows: Sequence[Tensor], mask: Tensor) -> Tensor:
        """The batch's tensor from its rows' units, zero at what is not kept: not NaN, which would reach the gradient
        of a head that computes every position and then takes one."""
        units = torch.cat(list(rows)).to(mask.device, non_blocking=True)
        if self.taken == "row":
            return units
        out = units.new_zeros(*mask.shape, *self.inner)
        out[self._places(mask)] = units
        return out

    def unread(self, mask: Tensor) -> Tensor:
        """NaN in the field's shape, without its memory: whoever reads it after all is seen at once."""
        shape = mask.shape[:1] if self.taken == "row" else mask.shape
        nan = torch.full((), torch.nan, dtype=self.dtype, device=mask.device)
        return nan.expand(*shape, *self.inner)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a head reads of its backbone. `output` is the class of the backbone's output, `read` are the fields that
    the head's logits depend on, `unread` the tensors that they do not. `inputs`: the arguments that tell one row from
    another."""

    output: Any
    read: tuple[Field, ...]
    unread: tuple[Field, ...]
    inputs: tuple[str, ...]

    def stand_in(self, rows: Sequence[dict[str, Tensor]], mask: Tensor) -> Any:
        """The backbone's output for a batch, from what is stored of its rows. mask: bool [rows, positions]."""
        values = {field.name: field.pad([row[field.name] for row in rows], mask) for field in self.read}
        return self.output(**values, **{field.name: field.unread(mask) for field in self.unread})
