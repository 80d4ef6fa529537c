"""DeepSpeed updates all its flat partitions in every step, and gives those without a gradient one of zeros: an update
would still move their counters, and decay their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class HeldBack:
    """The flat partitions that `optimizer` passes over: it sees no gradient of theirs, and has no state for them.

    A gradient comes back after the step, since where the state is offloaded DeepSpeed writes into one that it made at
    its start."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._flats: dict[int, Tensor] = {}
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        # before those of `update.scaled`, which looks at what is left
        optimizer.register_step_pre_hook(self._take)
        optimizer.register_step_post_hook(self._give_back)

    def __contains__(self, flat: Tensor) -> bool:
        return id(flat) in self._flats

    def hold(self, flats: Sequence[Tensor]) -> None:
        """From now on these, and no others."""
        self._flats = {id(flat): flat for flat in flats}
        for flat in flats:
            self._optimizer.state.pop(flat, None)

    def _take(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for flat in group["params"]:
                if flat in self:
                    self._gradients.append((flat, flat.grad))
                    flat.grad = None

    def _give_back(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for flat, gradient in self._gradients:
            flat.grad = gradient
        self._gradients.clear()
