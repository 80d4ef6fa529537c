"""What one process asks of its machine before a run, all through one object: a test puts a fault into a subclass of
`Probe`, and everything behind it is as in a run."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_LIMITS = {"nofile": "RLIMIT_NOFILE", "memlock": "RLIMIT_MEMLOCK", "nproc": "RLIMIT_NPROC"}


@dataclass(frozen=True, slots=True)
class Device:
    """What a rank computes on. Bytes are the device's, on a CPU the machine's (or the container's); `count` is how
    many of the kind this process sees."""

    kind: str
    name: str
    count: int
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface with its IPv4 and IPv6 addresses; `megabits` per second as the system says it, None where
    it does not know."""

    name: str
    addresses: tuple[str, ...]
    up: bool
    mtu: int
    megabits: int | None


class Probe:
    """The machine as it is. Every method is one question."""

    def environ(self) -> Mapping[str, str]:
        return os.environ

    def host(self) -> str:
        return platform.node()

    def place(self) -> str:
        """Which kernel and which of its networks: equal for two processes that reach each other by loopback."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
        except OSError:  # not Linux
            return platform.node()

    def clock(self) -> float:
        """Seconds since 1970 by this machine's clock."""
        return time.time()

    def versions(self) -> dict[str, str]:
        """Of all that takes part in the computation, by name."""
        import torch

        from tunesmith.environment import versions

        found = versions()
        if torch.version.cuda is not None:
            found["CUDA"] = torch.version.cuda
        if torch.version.hip is not None:
            found["HIP"] = torch.version.hip
        if torch.cuda.is_available() and torch.distributed.is_nccl_available():
            from torch.cuda import nccl

            found["NCCL"] = ".".join(map(str, nccl.version()))
        driver = Path("/sys/module/nvidia/version")
        if driver.is_file():
            found["NVIDIA driver"] = driver.read_text(encoding="ascii").strip()
        return found

    def device(self, local_rank: int) -> Device:
        import torch

        from tunesmith.engine import device_type
        from tunesmith.memory import free_memory_bytes

        kind = device_type()
        if kind == "cpu":
            memory = psutil.virtual_memory()
            return Device(
                "cpu", platform.machine(), psutil.cpu_count() or 1, memory.total, int(memory.available)
            )
        count = torch.accelerator.device_count()
        if kind != "cuda" or local_rank >= count:
            return Device(kind, kind, count, 0, 0)
        properties: Any = torch.cuda.get_device_properties(local_rank)
        free = free_memory_bytes(torch.device(kind, local_rank))
        return Device(kind, properties.name, count, properties.total_memory, free)

    def limits(self) -> dict[str, int | None]:
        """The soft ulimits; None is unlimited."""
        found: dict[str, int | None] = {}
        for name, constant in _LIMITS.items():
            if hasattr(resource, constant):
                soft = resource.getrlimit(getattr(resource, constant))[0]
                found[name] = None if soft == resource.RLIM_INFINITY else soft
        return found

    def disk(self, folder: Path) -> tuple[int, int] | None:
        """(free, total) bytes of the file system that the folder is or would be on; None where there is no such
        place."""
        there = next((place for place in (folder, *folder.parents) if place.exists()), None)
        if there is None:
            return None
        usage = shutil.disk_usage(there)
        return usage.free, usage.total

    def interfaces(self) -> list[Interface]:
        states = psutil.net_if_stats()
        found: list[Interface] = []
        for name, addresses in psutil.net_if_addrs().items():
            state = states.get(name)
            # of link-local addresses there is one on every interface, and none of them is enough to call
            numbers = tuple(
                a.address
                for a in addresses
                if a.family in (socket.AF_INET, socket.AF_INET6) and not a.address.startswith("fe80:")
            )
            up, mtu = (state.isup, state.mtu) if state is not None else (False, 0)
            # a virtual interface (veth, bridge, tap) says 10 Gbit/s, whatever lies behind it
            real = Path(f"/sys/class/net/{name}/device").exists()
            speed = state.speed if state is not None and state.speed > 0 and real else None
            found.append(Interface(name, numbers, up, mtu, speed))
        return found

    def addresses(self, name: str) -> list[str]:
        """What a host name resolves to, in order; nothing where it does not."""
        try:
            return list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(name, None)))
        except OSError:
            return []

    def route(self, address: str) -> str | None:
        """This machine's own address on the way to `address`; None where there is no way. Nothing is sent."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as plug:
            try:
                plug.connect((address, 9))
            except OSError:
                return None
            return str(plug.getsockname()[0])

    def has_infiniband(self) -> bool:
        folder = Path("/sys/class/infiniband")
        return folder.is_dir() and any(folder.iterdir())
