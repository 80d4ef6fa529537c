"""The time of an optimizer step, estimated from its operations: what the arithmetic units, the memory and the links
need at given shares of their speed. An order of magnitude to compare rows with, not a promise."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.planning.activations import Profile
from tunesmith.planning.memory import Setup
from tunesmith.planning.optimizers import state_bytes
from tunesmith.planning.workload import Workload
from tunesmith.recipe.parallel import DDP, FSDP2, Zero1, Zero2, Zero3


@dataclass(frozen=True, slots=True)
class Device:
    """Speeds as the maker states them, without sparsity. `half`, `full`: products of matrices in bf16 and in fp32
    (FLOP/s); `memory`, `link`: bytes/s of the device's memory and to a peer in the same machine, one way."""

    name: str
    half: float
    full: float
    memory: float
    link: float


DEVICES = {
    "h100": Device("H100 SXM", 989e12, 67e12, 3.35e12, 450e9),
    "h200": Device("H200 SXM", 989e12, 67e12, 4.8e12, 450e9),
    "a100": Device("A100 80GB SXM", 312e12, 19.5e12, 2.04e12, 300e9),
    "l40s": Device("L40S", 362e12, 91.6e12, 0.864e12, 32e9),
    "cpu": Device("CPU, 16 cores", 1e12, 1e12, 0.1e12, 10e9),
}
NETWORK = 50e9  # bytes/s of a device to another machine: 400 Gbit/s each
LAUNCH = 5e-6  # seconds that a kernel costs the host, which small models wait for
ARITHMETIC, BANDWIDTH, LINKS = 0.5, 0.8, 0.7  # the shares of those speeds that are reached


def assumptions(device: Device) -> str:
    """What the estimate rests on, in a line."""
    return (
        f"{device.name}: {device.half / 1e12:.0f} TFLOP/s bf16, {device.full / 1e12:.0f} fp32, "
        f"{device.memory / 1e12:.2f} TB/s, link {device.link / 1e9:.0f} GB/s, network {NETWORK / 1e9:.0f} GB/s; "
        f"{ARITHMETIC:.0%}, {BANDWIDTH:.0%} and {LINKS:.0%} of them reached"
    )


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds of one optimizer step, and the rows that it is for (the global batch)."""

    compute: float
    communication: float
    optimizer: float
    rows: int

    @property
    def total(self) -> float:
        """Communication goes on beside the computation; the longer of both counts."""
        return max(self.compute, self.communication) + self.optimizer


def duration(workload: Workload, setup: Setup, profile: Profile, device: Device, per_node: int) -> Duration:
    """A step of `setup`. Every part of the model takes the longest of its arithmetic, its traffic with the memory, as
    unfused operations make it, and the launching of its kernels."""
    speed = (device.full if workload.precision == "fp32" else device.half) * ARITHMETIC
    seconds = 0.0
    for part, _ in profile.expanded():
        table = part.at(setup.rows * workload.beside.views)
        flops, moved = float(table[:, 3].sum()), float(table[:, 4].sum())
        kernels = int((table[:, 4] > 0).sum())
        seconds += max(flops / speed, moved / (device.memory * BANDWIDTH), kernels * LAUNCH)
    steps = setup.accumulation(workload)
    link = (device.link if setup.world_size <= per_node else NETWORK) * LINKS
    shards = _optimizer_shards(setup)
    shapes = [p.shape for unit in workload.units for p in unit.parameters if p.trainable]
    touched = (12.0 * workload.trainable + 2.0 * state_bytes(workload.optim, shapes)) / shards
    return Duration(
        steps * seconds,
        _traffic(workload, setup, steps) / link,
        touched / (device.memory * BANDWIDTH),
        setup.rows * setup.world_size * steps,
    )


def _optimizer_shards(setup: Setup) -> int:
    match setup.parallel:
        case FSDP2(shard_size=size):
            return size or setup.world_size
        case Zero1() | Zero2() | Zero3():
            return setup.world_size
        case _:
            return 1


def _traffic(workload: Workload, setup: Setup, steps: int) -> float:
    """Bytes that a rank sends in a step. A ring's all-reduce is a reduce-scatter and a gather of (N − 1)/N of the
    tensor each (Patarasu & Yuan 2009)."""
    if setup.world_size == 1:
        return 0.0
    width = 4.0 if workload.precision == "fp32" else 2.0
    gradients, weights = 4.0 * workload.trainable, 4.0 * workload.numel
    match setup.parallel:
        case DDP() | Zero1():
            sent = 2 * gradients
        case Zero2():
            sent = steps * gradients + gradients
        case Zero3():
            sent = steps * (2 * weights + gradients)
        case FSDP2():
            sent = steps * (2 * width * workload.numel + gradients)
        case _:
            sent = 0.0
    return sent * (setup.world_size - 1) / setup.world_size
