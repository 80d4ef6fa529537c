"""That one node is fit by itself: limits, shared memory, disks, devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tunesmith.preflight.facts import Facts
from tunesmith.preflight.findings import Finding, error, warning
from tunesmith.tracking.text import size

MIB = 2**20
# a rank has files, libraries and pipes open, and with gloo or NCCL a socket or more to each peer
_FILES, _FILES_PER_PEER = 256, 4
_PROCESSES_PER_RANK = 64  # threads count: pools of OpenMP, gloo, NCCL and pinned-memory copies
_SHARED_LEAST, _SHARED_PER_RANK = (
    16 * MIB,
    64 * MIB,
)  # NCCL and DeepSpeed pass data between a node's ranks there
_DISK_LEAST = 64 * MIB  # encoded rows, compiled kernels


def fitness_findings(name: str, leader: Facts, here: Sequence[Facts]) -> Iterator[Finding]:
    """`leader` speaks for the node, `here` are the facts of all its ranks."""
    yield from _limits(name, leader)
    yield from _disks(name, leader)
    yield from _devices(name, leader, here)


def _limits(name: str, facts: Facts) -> Iterator[Finding]:
    files = facts.limits.get("nofile")
    needed = _FILES + _FILES_PER_PEER * facts.claim.world_size
    if files is not None and files < needed:
        what = f"a process may open {files} files, {facts.claim.world_size} ranks need about {needed}"
        yield error(name, what, "ulimit -n 65536 before the launch (in a container: --ulimit nofile=65536)")
    processes = facts.limits.get("nproc")
    needed = _PROCESSES_PER_RANK * facts.claim.local_world_size
    if processes is not None and processes < needed:
        what = f"a user may have {processes} processes and threads, its ranks need about {needed}"
        yield error(name, what, "ulimit -u unlimited before the launch")
    locked = facts.limits.get("memlock")
    if facts.infiniband and locked is not None and locked < 2**30:
        what = f"it has InfiniBand, but only {size(locked)} of memory may be locked: RDMA fails"
        yield error(name, what, "ulimit -l unlimited before the launch (in a container: --ulimit memlock=-1)")


def _disks(name: str, facts: Facts) -> Iterator[Finding]:
    for place, (free, total) in facts.disks.items():
        if place == "/dev/shm":
            ranks = facts.claim.local_world_size
            fix = "remove what lies there (ls /dev/shm), or give the container --shm-size=8g"
            if free < _SHARED_LEAST:
                yield error(name, f"/dev/shm has {size(free)} free of {size(total)}", fix)
            elif facts.device.kind != "cpu" and free < _SHARED_PER_RANK * ranks:
                yield warning(name, f"/dev/shm has {size(free)} free for {ranks} ranks", fix)
        elif free < _DISK_LEAST:
            what = f"{place} has {size(free)} free of {size(total)}"
            yield error(name, what, "free space there, or set data.cache_dir or TMPDIR to another disk")


def _devices(name: str, leader: Facts, here: Sequence[Facts]) -> Iterator[Finding]:
    device = leader.device
    if device.kind == "cpu":
        return
    ranks = max(leader.claim.local_world_size, len(here))
    if device.count < ranks:
        what = f"{ranks} ranks, but {device.count} {device.kind} device{'s' * (device.count != 1)} visible"
        yield error(
            name, what, "lower --num-processes, or see CUDA_VISIBLE_DEVICES and the scheduler's request"
        )
    for facts in here:
        total, free = facts.device.total_bytes, facts.device.free_bytes
        if total > 0 and free < total / 2:
            what = f"rank {facts.claim.rank}'s {facts.device.name} has {size(free)} free of {size(total)}"
            yield warning(name, what, "another process holds its memory: see nvidia-smi")
