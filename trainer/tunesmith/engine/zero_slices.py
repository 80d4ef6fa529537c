"""Which elements of which parameter lie where in DeepSpeed's flat partitions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

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


def gradients(zero: Any, index: int) -> dict[int, Tensor]:
    """Place in the flat tensor → what DeepSpeed will copy there before its step, flat, in memory that it reads; padding
    included."""
    group: Any = zero.averaged_gradients.get(index) or []
    found: dict[int, Tensor] = {}
    at = 0
    for number, gradient in enumerate(group):
        if not gradient.is_contiguous():
            group[number] = gradient = gradient.contiguous()
        found[at] = gradient.view(-1)
        at += gradient.numel()
    return found


def clear(zero: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Zeroes the gradients that stage 3 keeps of these parameters: one that a window does not use would have those of
    the window that used it last."""
    parameters = list(parameters)
    if not parameters:
        return
    held: dict[int, Tensor] = vars(zero)["_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"]
    for parameter in parameters:
        held[cast(Any, parameter).ds_id].zero_()


def gathered_again(zero: Any, stage: int) -> None:
    """Makes the parameters follow the flat fp32 tensors, as DeepSpeed does in its step."""
    if stage < 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for index in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    if zero.persistent_parameters:  # small ones, which stay whole between the steps
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
