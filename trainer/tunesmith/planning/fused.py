"""The loss without logits, as a plan sees it: one operator, of which the trace has the inputs and outputs, and the
kernels' own arithmetic what is between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tunesmith.fused_head import FusedHead
from tunesmith_kernels.linear_loss.backends import path_for
from tunesmith_kernels.linear_loss.chunks import Wanted
from tunesmith_kernels.linear_loss.workspace import Shapes, flops, moved_bytes, workspace

OPERATOR = torch.ops.tunesmith.linear_cross_entropy


@dataclass(frozen=True, slots=True)
class Loss:
    """What computes it where the plan is for: the recipe's `asked` backend, or the one that would be chosen."""

    asked: str | None
    cuda: bool

    def backend(self, dtype: torch.dtype) -> str:
        if self.asked is not None:
            return self.asked
        return "triton" if self.cuda else path_for(torch.device("cpu"), dtype)[0]

    def call(self, args: Sequence[Any], *, all_rows: bool) -> Shapes:
        """What the operator was called with."""
        hidden, weight, bias = args[:3]
        assert isinstance(hidden, Tensor)
        assert isinstance(weight, Tensor)
        return Shapes(
            hidden.shape[0],
            hidden.shape[1],
            weight.shape[0],
            hidden.dtype,
            weight.dtype,
            None if bias is None else bias.dtype,
            Wanted(*args[-3:]),
            "cuda" if self.cuda else "cpu",
            self.backend(hidden.dtype),
            all_rows,
        )


@dataclass(frozen=True, slots=True)
class Spike:
    """A call at event `event` of its span. Its chunks are no affine function of the rows: `at` computes them for each
    micro-batch. `positions`: rows of hidden states for a row of the micro-batch."""

    event: int
    call: Shapes
    positions: float

    def at(self, rows: int) -> tuple[int, int, int, int]:
        """(bytes of live, those of them of logits, FLOPs, bytes moved) of the operator alone."""
        call = replace(self.call, rows=round(self.positions * rows))
        needed = workspace(call)
        return needed.total, needed.logits, flops(call), moved_bytes(call)


def traceable(head: FusedHead) -> FusedHead:
    """The head with a backend that can be named without asking the machine: the trace runs none."""
    return replace(head, backend="torch")
