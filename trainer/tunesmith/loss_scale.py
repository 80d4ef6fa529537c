"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018), on the device and without a host synchronisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GROWTH_INTERVAL = 2000


class LossScale:
    """Starts at 2^16, doubles after 2000 steps without an overflow, halves at one. Off (1.0) unless `enabled`."""

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self.value = torch.full((), 65536.0 if enabled else 1.0, device=device)
        self._growth = torch.zeros((), dtype=torch.int32, device=device)

    def apply(self, loss: Tensor) -> Tensor:
        return loss * self.value if self.enabled else loss

    def update(self, overflow: Tensor) -> None:
        """`overflow` (0-dim fp32) is not zero where this step's gradients were not finite."""
        if self.enabled:
            update: Any = vars(torch)["_amp_update_scale_"]  # what GradScaler calls; it has no public name
            update(self.value, self._growth, overflow, 2.0, 0.5, GROWTH_INTERVAL)

    def state(self) -> dict[str, float]:
        return {"scale": float(self.value), "growth": int(self._growth)} if self.enabled else {}

    def load_state(self, state: dict[str, float]) -> None:
        if self.enabled and state:
            self.value.fill_(state["scale"])
            self._growth.fill_(int(state["growth"]))
