"""Memory where every rank holds the whole model: one process, and DDP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tunesmith.planning.memory import Breakdown, Place, Setup, norm_bytes
from tunesmith.planning.optimizers import temporaries
from tunesmith.planning.workload import Workload
from tunesmith.recipe.parallel import DDP


def moments(workload: Workload, setup: Setup, found: list[Place]) -> Iterator[Breakdown]:
    """Weights and optimizer state in fp32, all the time. DDP's reducer has buckets as large as all gradients
    (torch/csrc/distributed/c10d/reducer.cpp; gradients are no views of them, accelerate's default)."""
    shapes = [p.shape for unit in workload.units for p in unit.parameters if p.trainable]
    gradients = 4.0 * workload.trainable
    held = Breakdown(
        weights=workload.stored + workload.buffers,
        optimizer=workload.state_bytes(shapes),
        buffers=gradients if isinstance(setup.parallel, DDP) else 0.0,
    )
    done = 0.0
    for place in found:
        yield place.peak(keeps_gradients=True, base=replace(held, gradients=done))
        done += place.gradients
    full = replace(held, gradients=gradients)
    if setup.accumulation(workload) > 1:
        for place in found:
            yield place.peak(keeps_gradients=False, base=full)
    needed = max(
        norm_bytes(setup, workload.trainable),
        temporaries(workload.optim, workload.kernels, shapes, setup.device),
    )
    yield replace(full, activations=needed, moment="optimizer's step")
