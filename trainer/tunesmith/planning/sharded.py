"""Memory under torch's fully_shard (FSDP2), after its source: torch/distributed/fsdp/_fully_shard,
`_fsdp_param_group.py` (unshard, wait_for_unshard, post_backward) and `_fsdp_collectives.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tunesmith.planning.memory import Breakdown, Place, Setup, norm_bytes, unit_of
from tunesmith.planning.optimizers import temporaries
from tunesmith.planning.workload import Unit, Workload
from tunesmith.recipe.parallel import FSDP2


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of a unit: `whole`: its parameters in the dtype that they are computed in, padded; `gathered`: the
    all-gather's output, which they are copied out of; `cast`: a rank's slice in that dtype, made for the gather
    where it is not fp32; `reduced`: the input of the reduce-scatter, fp32; `last`: the gradient of its last parameter,
    which the function that reduces holds on to (foreach_reduce: the variable of a loop over them)."""

    whole: float
    gathered: float
    cast: float
    reduced: float
    last: float = 0.0


def _sizes(unit: Unit, shards: int, width: int) -> _Sizes:
    whole = float(unit.shard(shards) * shards * width)
    trained = [p for p in unit.parameters if p.trainable]
    return _Sizes(
        whole=whole,
        gathered=whole if shards > 1 else 0.0,
        cast=whole / shards if width < 4 and shards > 1 else 0.0,
        reduced=4.0 * unit.trained_shard(shards) * shards,
        last=float(width * trained[-1].numel) if trained and shards > 1 else 0.0,
    )


def moments(workload: Workload, setup: Setup, found: list[Place]) -> Iterator[Breakdown]:
    """A rank's slices of weights, gradients and state in fp32; the root whole from the forward's beginning to the
    backward's end; a layer whole while it is computed."""
    assert isinstance(setup.parallel, FSDP2)
    shards = setup.parallel.shard_size or setup.world_size
    width = 4 if workload.precision == "fp32" else 2
    units = workload.units
    local = [
        (p.shard(shards) // max(1, p.numel // max(1, p.shape[0] if p.shape else 1)), *p.shape[1:])
        for unit in units
        for p in unit.parameters
        if p.trainable
    ]
    slices = 4.0 * sum(unit.trained_shard(shards) for unit in units)
    held = Breakdown(
        weights=4.0 * sum(unit.shard(shards) for unit in units) + workload.buffers,
        optimizer=workload.state_bytes(local),
    )
    if setup.parallel.offload:
        held, slices = Breakdown(weights=workload.buffers), 0.0
    yield from _micro_step(workload, setup, shards, width, found, held, fresh=True)
    full = replace(held, gradients=slices)
    if setup.accumulation(workload) > 1:
        yield from _micro_step(workload, setup, shards, width, found, full, fresh=False)
    if not setup.parallel.offload:
        needed = max(
            norm_bytes(setup, slices / 4), temporaries(workload.optim, workload.kernels, local, setup.device)
        )
        yield replace(full, activations=needed, moment="optimizer's step")


def _micro_step(
    workload: Workload,
    setup: Setup,
    shards: int,
    width: int,
    found: list[Place],
    held: Breakdown,
    *,
    fresh: bool,
) -> Iterator[Breakdown]:
    # gloo's collectives work on a copy of their output or input (ProcessGroupGloo.cpp)
    copies = 2.0 if setup.device == "cpu" and shards > 1 else 1.0
    root = _sizes(workload.root, shards, width)
    units = [
        _sizes(unit_of(workload, p), shards, width) for p in found if p.is_layer and p.part.phase == "forward"
    ]
    # the root is gathered first: output of the gather, then the parameters copied out of it
    yield replace(held, gather=root.cast * 2 + root.gathered * copies, moment="gather of the root")
    waiting = root.gathered  # a gather's output is let go of when the next unit's is there, in the forward
    at, slices, own_gradients, reducing = 0, held.gradients, 0.0, 0.0
    held = replace(held, gradients=0.0)
    for place in found:
        base = replace(held, gradients=slices + own_gradients, buffers=reducing, gather=root.whole)
        if not place.is_layer:
            yield place.peak(keeps_gradients=True, base=replace(base, gather=root.whole + waiting))
            own_gradients += place.gradients
        elif place.part.phase == "forward":
            unit, at = units[at], at + 1
            yield from _forward(place, base, unit, waiting, copies)
            waiting = unit.gathered
        else:
            at -= 1
            unit, following = units[at], units[at - 1] if at > 0 else _Sizes(0.0, 0.0, 0.0, 0.0)
            yield from _backward(place, base, unit, following, shards, copies)
            reducing, waiting = unit.reduced, 0.0
            slices += reducing / shards if fresh else 0.0
    last = replace(held, gradients=slices, moment="reduction of the root")
    yield from _reduction(last, own_gradients, root, shards, copies)


def _reduction(
    base: Breakdown, gradients: float, unit: _Sizes, shards: int, copies: float
) -> Iterator[Breakdown]:
    """The gradients are copied to the input of the reduce-scatter, and go; then its output is made."""
    yield replace(base, gradients=base.gradients + gradients, buffers=unit.reduced)
    kept = base.gradients + min(unit.last, gradients)
    yield replace(base, gradients=kept, buffers=unit.reduced * (copies + 1 / shards))


def _forward(
    place: Place, base: Breakdown, unit: _Sizes, waiting: float, copies: float
) -> Iterator[Breakdown]:
    """The layer's gather begins while the output of the last one is still there; then the copy takes its place."""
    here = replace(base, activations=place.level, moment=place.moment)
    yield replace(here, gather=base.gather + waiting + unit.gathered * copies + unit.cast * 2)
    whole = replace(base, gather=base.gather + unit.whole + unit.gathered)
    yield place.peak(keeps_gradients=False, base=whole)


def _backward(
    place: Place, base: Breakdown, unit: _Sizes, following: _Sizes, shards: int, copies: float
) -> Iterator[Breakdown]:
    """The layer is copied out of a gather that began during the layer above, then the gather of the one below begins.
    Afterwards the layer goes, and its gradients are reduced; the reduction's input stays until the next one's."""
    here = replace(base, activations=place.level, moment=place.moment)
    yield replace(here, gather=base.gather + unit.gathered + unit.whole)
    ahead = base.gather + following.gathered
    yield replace(here, gather=ahead + (copies - 1) * following.gathered + unit.whole + following.cast * 2)
    yield place.peak(keeps_gradients=True, base=replace(base, gather=ahead + unit.whole))
    done = replace(
        here,
        activations=place.level + float(place.table[-1, 0]),
        gather=ahead,
        moment=f"reduction of layer {place.layer}",
    )
    yield from _reduction(done, place.gradients, unit, shards, copies)
