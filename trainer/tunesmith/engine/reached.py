"""What a loss depends on."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def reached(loss: Tensor) -> set[int]:
    """The ids of the parameters that the loss depends on, from its graph."""
    found: set[int] = set()
    seen: set[Any] = set()
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack += [following for following, _ in node.next_functions]
    return found
