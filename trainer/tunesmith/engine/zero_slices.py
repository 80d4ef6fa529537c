"""Which elements of which parameter lie where in DeepSpeed's flat partitions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tunesmith.shapes import whole_shape


@dataclass(frozen=True, slots=True)
class Slice:
    """`count` elements of the parameter `name` of `shape`, from `start` on in C order, at `at` in the flat tensor."""

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    at: int


def slices(zero: Any, named: Mapping[str, nn.Parameter], stage: int, rank: int) -> dict[int, list[Slice]]:
    """Index of the flat tensor → this rank's slices in it; `zero` is DeepSpeed's ZeRO optimizer, `named` the parameters
    that it was built for."""
    find = _stage3 if stage == 3 else _stage12
    found: dict[int, list[Slice]] = {}
    for name, parameter in named.items():
        place = find(zero, parameter, rank)
        if place is not None:
            index, start, count, at = place
            shape = tuple(whole_shape(parameter))
            found.setdefault(index, []).append(Slice(name, shape, start, count, at))
    return found


def _stage12(zero: Any, parameter: nn.Parameter, rank: int) -> tuple[int, int, int, int] | None:
    # DeepSpeed links each parameter with the fragment of it that this rank updates, if there is one
    fragment: Any = getattr(parameter, "_hp_mapping", None)
    if fragment is None:
        return None
    inner, outer = fragment.lp_fragment_address, fragment.hp_fragment_address
    return fragment.param_group_index, inner.start, inner.numel, outer.start


def _stage3(zero: Any, parameter: nn.Parameter, rank: int) -> tuple[int, int, int, int] | None:
    index, at, size = zero.grad_position[zero.get_param_id(parameter)]
    whole = whole_shape(parameter).numel()
    start = rank * size
    count = min(size, whole - start)  # the last ranks' slices end in padding
    return (index, start, count, at) if count > 0 else None
