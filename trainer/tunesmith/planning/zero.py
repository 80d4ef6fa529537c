"""Memory under DeepSpeed ZeRO with fp32 weights, after its source (0.19): stages 1 and 2 in
deepspeed/runtime/zero/stage_1_and_2.py, stage 3 in stage3.py, partition_parameters.py and
partitioned_param_coordinator.py (planning/zero_gather.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil

import numpy as np

from tunesmith.planning.memory import Breakdown, Place, Setup, norm_bytes, unit_of
from tunesmith.planning.optimizers import temporaries
from tunesmith.planning.workload import Parameter, Workload
from tunesmith.planning.zero_gather import EMBEDDING, HEAD, Asked, Gathers, simulate
from tunesmith.recipe.parallel import Zero1, Zero2, Zero3


def moments(workload: Workload, setup: Setup, found: list[Place]) -> Iterator[Breakdown]:
    match setup.parallel:
        case Zero3():
            return _stage3(workload, setup, found)
        case _:
            return _stages_1_and_2(workload, setup, found)


def _groups(workload: Workload) -> list[list[Parameter]]:
    """The optimizer's groups, in the order of the flat tensors: matrices decay, vectors do not (tunesmith.optim)."""
    trained = [p for unit in workload.units for p in unit.parameters if p.trainable]
    trained.sort(key=lambda p: p.place)
    groups = [[p for p in trained if len(p.shape) > 1], [p for p in trained if len(p.shape) <= 1]]
    return [group for group in groups if group]


def _owned(groups: list[list[Parameter]], ranks: int) -> int:
    """Elements of the parameters that reach into the fullest rank's partition: their reduced gradients are kept
    whole (`grads_in_partition`)."""
    most = 0
    for rank in range(min(ranks, 64)):  # the parts of so many ranks are alike
        own = 0
        for group in groups:
            size = ceil(sum(p.numel for p in group) / ranks)
            start = 0
            for p in group:
                if start < (rank + 1) * size and start + p.numel > rank * size:
                    own += p.numel
                start += p.numel
        most = max(most, own)
    return most


def _stages_1_and_2(workload: Workload, setup: Setup, found: list[Place]) -> Iterator[Breakdown]:
    """All weights in one flat fp32 tensor, a rank's part of them once more for the optimizer with its state. From a
    backward's first gradient on there is a bucket. Stage 2 moves each gradient into it at once, but for one that is
    larger than it, which stays until the next is there; it keeps what it reduces of the parameters in its partition.
    Stage 1 keeps all gradients until the window's last backward is done. A reduction needs a flat copy of what is in
    the bucket."""
    assert isinstance(setup.parallel, Zero1 | Zero2)
    ranks, stage = setup.world_size, 2 if isinstance(setup.parallel, Zero2) else 1
    groups = _groups(workload)
    parts = [ceil(sum(p.numel for p in group) / ranks) for group in groups]
    flats = [(part,) for part in parts]
    owned = 4.0 * _owned(groups, ranks)
    bucket, copied = 4.0 * setup.bucket, 4.0 * min(setup.bucket, workload.trainable)
    everything = 4.0 * workload.trainable
    held = Breakdown(weights=workload.stored + workload.buffers)
    if not setup.parallel.offload_optimizer:
        held = replace(held, optimizer=4.0 * sum(parts) + workload.state_bytes(flats))
    accumulates = setup.accumulation(workload) > 1
    for again in (False, True) if accumulates else (False,):
        done, in_bucket, large, reduced = 0.0, 0.0, 0.0, False
        before = (everything if stage == 1 else owned) if again else 0.0
        for place in found:
            base = replace(held, gradients=before, buffers=bucket * (stage == 1 and again))
            if place.part.phase == "forward":  # the last of which, the head, has the first gradients of all
                early = place.before_gradients()
                if early is not None:
                    yield early.peak(keeps_gradients=False, base=base)
                if not place.gradients:
                    continue
                place = place.from_gradients()
            base = replace(base, buffers=bucket)
            if stage == 1:
                base = replace(base, gradients=before if again else done)
                yield place.peak(keeps_gradients=not again, base=base)
                done += place.gradients
                continue
            reductions, in_bucket = _reductions(place, in_bucket, bucket)
            kept = before + owned * reduced
            during, large = _larger(place, large, bucket)
            for event, live, filled in reductions:
                own = before + (filled if filled > bucket else 0.0)
                here = replace(base, activations=live, moment=place.moment)
                yield replace(here, gradients=own + owned * reduced, buffers=bucket + filled)
                yield replace(here, gradients=own + owned)  # what is kept of it is copied before it goes
                if not reduced:
                    during.table[event:, 1] += owned
                reduced = True
            yield during.peak(keeps_gradients=True, base=replace(base, gradients=kept))
        last = replace(held, buffers=bucket + copied, moment="reduction of the gradients")
        if stage == 1:
            yield replace(last, gradients=everything - copied)
            if everything > 2 * copied:
                yield replace(last, gradients=everything - 2 * copied + owned)
        else:
            filled = min(in_bucket, copied)
            yield replace(last, buffers=bucket + filled, gradients=before + owned * reduced)
            yield replace(last, buffers=bucket, gradients=before + owned)
    step = replace(held, gradients=owned, activations=4.0 * max(parts), moment="optimizer's step")
    yield replace(step, activations=max(step.activations, norm_bytes(setup, sum(parts))))
    yield replace(
        step,
        activations=temporaries(workload.optim, workload.kernels, flats, setup.device) + 4.0 * max(parts),
    )


def _reductions(
    place: Place, in_bucket: float, bucket: float
) -> tuple[list[tuple[int, float, float]], float]:
    """([(event, live bytes of activations, bytes in the bucket) when a gradient finds it full], bytes in it at the
    end)."""
    found: list[tuple[int, float, float]] = []
    for event, size in enumerate(_sizes(place)):
        if size > 0 and in_bucket + size > bucket:
            if in_bucket:
                found.append((event, place.level + float(place.table[event, 0]) + size, in_bucket))
            in_bucket = 0.0
        in_bucket += max(size, 0.0)
    return found, in_bucket


def _sizes(place: Place) -> list[float]:
    """The bytes of parameter gradients that each event finishes."""
    return [float(size) for size in np.diff(place.table[:, 1], prepend=0.0)]


def _larger(place: Place, large: float, bucket: float) -> tuple[Place, float]:
    """(the place with a gradient that is larger than the bucket as its gradients: `large` bytes at first; those bytes
    at its end)."""
    table = place.table.copy()
    for event, size in enumerate(_sizes(place)):
        if size > 0:
            large = size if size > bucket else 0.0
        table[event, 1] = large
    return replace(place, table=table), large


def _stage3(workload: Workload, setup: Setup, found: list[Place]) -> Iterator[Breakdown]:
    """A rank's slices of the weights, and once more for the optimizer (DeepSpeed means to share them where both are
    fp32, but compares a device with its name); of the gradients a flat buffer; and the reduction's bucket, all of
    them all the time. What is gathered is the coordinator's decision. A reduction
    interleaves the bucket's gradients by rank in a copy."""
    assert isinstance(setup.parallel, Zero3)
    ranks = setup.world_size

    def slices(parameters: list[Parameter]) -> int:
        return sum(ceil(p.numel / ranks) for p in parameters)

    groups = _groups(workload)
    flats = [(slices(group),) for group in groups]
    trained = 4.0 * sum(size for (size,) in flats)
    everything = 4.0 * slices([p for unit in workload.units for p in unit.parameters])
    bucket = 4.0 * setup.bucket
    held = Breakdown(weights=everything + workload.buffers, buffers=bucket)
    if setup.parallel.offload_parameters:
        held = replace(held, weights=workload.buffers)
    if not setup.parallel.offload_optimizer:
        held = replace(held, optimizer=trained + workload.state_bytes(flats), gradients=trained)
    gathers = simulate(workload, setup.bucket)
    in_bucket = 0.0
    gloo = (
        1.0 if setup.device == "cpu" else 0.0
    )  # gathers and reduce-scatters on a copy (ProcessGroupGloo.cpp)
    for place in found:
        asked, during = _gathered(gathers, workload, place)
        base = replace(held, gather=4.0 * during)
        waiting = replace(base, gather=4.0 * (asked.elements + gloo * asked.batch), moment=place.moment)
        yield replace(waiting, activations=place.level)
        yield place.peak(keeps_gradients=False, base=base)
        reductions, in_bucket = _reductions(place, in_bucket, bucket)
        for _, live, filled in reductions:
            here = replace(base, activations=live, moment=place.moment)
            yield replace(here, buffers=bucket + filled * (1 + gloo))
    last = replace(held, gather=4.0 * gathers.end, moment="reduction of the gradients")
    yield replace(last, buffers=bucket + min(in_bucket, bucket) * (1 + gloo))
    step = 4.0 * max(size for (size,) in flats) + temporaries(
        workload.optim, workload.kernels, flats, setup.device
    )
    yield replace(held, activations=max(step, norm_bytes(setup, trained / 4)), moment="optimizer's step")


def _gathered(gathers: Gathers, workload: Workload, place: Place) -> tuple[Asked, float]:
    phase = place.part.phase
    if place.is_layer:
        name = unit_of(workload, place).name
    else:
        name = EMBEDDING if phase == "backward" or place.level == 0.0 else HEAD
    nothing = Asked(gathers.end, 0.0)
    return gathers.asked.get((phase, name), nothing), gathers.during.get((phase, name), gathers.end)
