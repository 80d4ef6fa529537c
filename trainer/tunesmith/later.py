"""A device value that the host reads later, without stopping the device in between."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """Starts the copy to the host now; `read` waits for this copy alone, not for work queued after it."""

    def __init__(self, value: Tensor) -> None:
        self._event: torch.Event | None = None
        if value.device.type == "cpu":
            self._host = value
        else:
            self._host = torch.empty_like(value, device="cpu", pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._event = torch.Event(device=value.device)
            self._event.record()

    def read(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host
