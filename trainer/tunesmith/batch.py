"""What one forward of one rank sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED = -100  # the label of a position without loss, as everywhere in the field


@dataclass(frozen=True, slots=True)
class Batch:
    """`inputs` are keyword arguments of the model's forward, `targets` what the terms compare with. A filler (a
    rank without rows in a micro-step, which must still run the collectives) has rows of -1 and no units."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    rows: tuple[int, ...]  # places in the table; -1 for a filler
    tokens: int  # not counting padding
    aligned: bool = False  # labels stand where they are predicted, not where they are read
    draws: Tensor | None = (
        None  # int64 [rows]: a random number per row, of (seed, epoch, row); while training
    )
    task: str = ""  # of a run of several

    @property
    def samples(self) -> int:
        return sum(row >= 0 for row in self.rows)

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return replace(
            self,
            inputs={name: value.to(device, non_blocking=True) for name, value in self.inputs.items()},
            targets={name: value.to(device, non_blocking=True) for name, value in self.targets.items()},
            draws=None if self.draws is None else self.draws.to(device, non_blocking=True),
        )

    def repeated(self, times: int) -> Batch:
        """All rows `times` times, one copy of them behind the other."""
        if times == 1:
            return self
        return replace(
            self,
            inputs={name: _repeated(value, times) for name, value in self.inputs.items()},
            targets={name: _repeated(value, times) for name, value in self.targets.items()},
            rows=self.rows * times,
            tokens=self.tokens * times,
            draws=None if self.draws is None else self.draws.repeat(times),
        )

    def as_filler(self) -> Batch:
        """The same shapes with nothing to learn: integer labels ignored, `row_mask` zero."""
        blank = {
            name: torch.full_like(value, 0 if name == "row_mask" or value.is_floating_point() else IGNORED)
            for name, value in self.targets.items()
        }
        return replace(self, targets=blank, rows=(-1,) * len(self.rows), tokens=0)


def _repeated(value: Tensor, times: int) -> Tensor:
    return value.repeat(times, *[1] * (value.ndim - 1))
