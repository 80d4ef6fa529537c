"""The rows of a plan, and which of them to take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunesmith.planning.inspect import Inspected, inspect
from tunesmith.planning.memory import Breakdown, Setup, estimate
from tunesmith.planning.timing import Device, Duration, duration
from tunesmith.recipe import Recipe
from tunesmith.recipe.parallel import DDP, FSDP2, Parallel, Single, Zero1, Zero2, Zero3

GIB = 2**30
USABLE = 0.9  # of a device's memory: the rest is for CUDA's context, NCCL, workspaces and fragmentation
WORTH = 0.97  # a row that needs more machinery must take less than this share of the time
_MOST_ROWS = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One way to run the workload. `low` and `high` (bytes) bound the estimate of `memory`."""

    setup: Setup
    memory: Breakdown
    time: Duration
    usable: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable

    @property
    def missing(self) -> float:
        """Bytes above what is usable; negative: left over."""
        return self.memory.total - self.usable

    @property
    def strategy(self) -> str:
        parallel = self.setup.parallel
        if isinstance(parallel, FSDP2) and parallel.shard_size is not None:
            return f"fsdp2 × {parallel.shard_size}"
        return parallel.strategy


def strategies(world_size: int, per_node: int) -> list[Parallel]:
    """From the simplest on."""
    if world_size == 1:
        return [Single(strategy="single")]
    found: list[Parallel] = [
        DDP(strategy="ddp"),
        Zero1(strategy="zero1"),
        Zero2(strategy="zero2"),
        FSDP2(strategy="fsdp2"),
        Zero3(strategy="zero3"),
    ]
    if world_size > per_node and world_size % per_node == 0:
        found.insert(3, FSDP2(strategy="fsdp2", shard_size=per_node))
    return found


def micro_batches(workload_rows: int, world_size: int) -> list[int]:
    """Powers of two up to a rank's share of the global batch."""
    share = max(1, -(-workload_rows // world_size))
    found = [1]
    while found[-1] * 2 <= min(share, _MOST_ROWS):
        found.append(found[-1] * 2)
    if share <= _MOST_ROWS and share not in found:
        found.append(share)
    return found


def row(found: Inspected, setup: Setup, device: Device, per_node: int, device_bytes: float) -> Row:
    profile = found.profile(found.variant(setup.parallel, setup.checkpointing, setup.device))
    memory = estimate(found.workload, setup, profile)
    time = duration(found.workload, setup, profile, device, per_node)
    return Row(setup, memory, time, USABLE * device_bytes)


def table(
    found: Inspected, world_size: int, per_node: int, device: Device, device_bytes: float, kind: str = "cuda"
) -> list[Row]:
    """Every strategy × checkpointing × micro-batch."""
    return [
        row(found, Setup(parallel, world_size, rows, checkpointing, kind), device, per_node, device_bytes)
        for parallel in strategies(world_size, per_node)
        for checkpointing in ((False, True) if found.workload.can_checkpoint else (False,))
        for rows in micro_batches(found.workload.rows_per_step, world_size)
    ]


def recommend(rows: list[Row]) -> Row | None:
    """The fastest row that fits; a simpler one that is nearly as fast (in the order of the rows) goes before it, and
    of two alike the one that leaves more memory."""
    fitting = [one for one in rows if one.fits]
    if not fitting:
        return None
    best = min(fitting, key=lambda one: one.time.total)
    near = [one for one in fitting if one.time.total * WORTH <= best.time.total]
    simplest = near[0].setup
    like = [
        one
        for one in near
        if one.strategy == near[0].strategy and one.setup.checkpointing == simplest.checkpointing
    ]
    return min(like, key=lambda one: one.memory.total)


def choose_strategy(
    recipe: Recipe, world_size: int, device_memory_bytes: int, base: Path = Path(), kind: str = "cuda"
) -> tuple[Parallel, str]:
    """What `parallel.strategy: auto` means on `world_size` devices of that memory, with the recipe's own micro-batch
    and checkpointing: (the section, why). The simplest of ddp and fsdp2 that fits; fsdp2, which needs the least,
    where neither does. Raises UserError where the model's config cannot be had."""
    if world_size == 1:
        return Single(strategy="single"), "auto: one process"
    found = inspect(recipe, base)
    reasons: list[str] = []
    candidates: list[Parallel] = [DDP(strategy="ddp"), FSDP2(strategy="fsdp2")]
    chosen = candidates[-1]
    for parallel in candidates:
        rows = recipe.training.per_device_train_batch_size
        setup = Setup(parallel, world_size, rows, recipe.model.gradient_checkpointing, kind)
        variant = found.variant(parallel, setup.checkpointing, kind)
        memory = estimate(found.workload, setup, found.profile(variant))
        usable = USABLE * device_memory_bytes
        word = "fits into" if memory.total <= usable else "does not fit into"
        reasons.append(
            f"{parallel.strategy} needs {memory.total / GIB:.2f} GiB and {word} {usable / GIB:.2f}"
        )
        if memory.total <= usable:
            chosen = parallel
            break
    return chosen, f"auto: {'; '.join(reasons)} (an estimate: tunesmith plan)"
