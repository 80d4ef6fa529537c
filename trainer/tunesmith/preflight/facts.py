"""What one rank knows of itself, to be compared with what the others know. Gathering takes no communication."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tunesmith.preflight import content
from tunesmith.preflight.probe import Device, Probe
from tunesmith.recipe import Recipe

_PREFIXES = ("TUNESMITH_", "ACCELERATE_", "NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_GLOO_", "DS_", "FSDP_")
_NAMES = (
    "OMP_NUM_THREADS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
# what is a node's own: places, names of its hardware, what is only printed, and secrets
_OWN = ("IFNAME", "_HCA", "FILE", "CACHE", "DEBUG", "SUPERVISOR", "_DATA", "TOKEN", "KEY", "SECRET", "PASSW")


@dataclass(frozen=True, slots=True)
class Claim:
    """Who a process says it is: cheap, and so the first thing that it says. `uid` is the process's own."""

    uid: str
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    machine: int  # the launcher's number for this node; -1 where it gave none
    host: str
    place: str  # which kernel and network: Probe.place

    @property
    def leads(self) -> bool:
        """Whether it speaks for its node."""
        return self.local_rank == 0


@dataclass(frozen=True, slots=True)
class Network:
    """`address` is where the ranks' collectives would listen, on `interface` (None: of no interface); `wanted` are
    names of interfaces that the environment asks for and the node lacks; `toward` is the interface of the route to
    rank 0, `master` the address of rank 0 as this node resolves it."""

    master: str
    address: str
    interface: str | None
    loopback: bool
    toward: str | None
    wanted: dict[str, str] = field(default_factory=dict[str, str])
    available: tuple[str, ...] = ()
    mtu: int | None = None
    megabits: int | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """One rank's. The fields from `recipe` on are a node's, and empty on ranks that do not lead one."""

    claim: Claim
    device: Device
    versions: dict[str, str]
    environ: dict[str, str]
    limits: dict[str, int | None]
    recipe: dict[str, str] = field(default_factory=dict[str, str])
    data: dict[str, str] = field(default_factory=dict[str, str])
    model: dict[str, str] = field(default_factory=dict[str, str])
    code: dict[str, str] = field(default_factory=dict[str, str])
    disks: dict[str, tuple[int, int]] = field(
        default_factory=dict[str, tuple[int, int]]
    )  # (free, total) bytes
    network: Network | None = None
    infiniband: bool = False
    clock: tuple[float, float] | None = None  # seconds ahead of rank 0: at least, at most

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Facts:
        return _FACTS.validate_python(values)


_FACTS = TypeAdapter(Facts)


def claim(probe: Probe, uid: str) -> Claim:
    """Read from what torchrun, `accelerate launch` or a scheduler set in the environment."""
    environ = probe.environ()

    def number(name: str, default: int) -> int:
        return int(environ.get(name) or default)

    return Claim(
        uid=uid,
        rank=number("RANK", 0),
        local_rank=number("LOCAL_RANK", 0),
        world_size=number("WORLD_SIZE", 1),
        local_world_size=number("LOCAL_WORLD_SIZE", 1),
        machine=number("GROUP_RANK", -1),
        host=probe.host(),
        place=probe.place(),
    )


def gather(recipe: Recipe, base: Path, who: Claim, probe: Probe) -> Facts:
    """`recipe` is as it was read, its paths not yet resolved against `base` (folders may differ between nodes, what
    lies in them may not)."""
    facts = Facts(
        claim=who,
        device=probe.device(who.local_rank),
        versions=probe.versions(),
        environ=compared(probe),
        limits=probe.limits(),
    )
    if not who.leads:
        return facts
    return replace(
        facts,
        recipe=content.recipe_values(recipe),
        data=content.data_digests(recipe, base),
        model=content.model_digests(recipe, base),
        code=content.code_digests(),
        disks=disks(recipe, probe),
        network=network(probe),
        infiniband=probe.has_infiniband(),
    )


def compared(probe: Probe) -> dict[str, str]:
    """The environment variables on which the ranks must agree."""
    return {
        name: value
        for name, value in sorted(probe.environ().items())
        if (name.startswith(_PREFIXES) or name in _NAMES) and not any(own in name.upper() for own in _OWN)
    }


def disks(recipe: Recipe, probe: Probe) -> dict[str, tuple[int, int]]:
    from tunesmith.data.prepare import cache_root

    places = {"/dev/shm": Path("/dev/shm"), "the cache": cache_root(*list(recipe.each_data.values())[:1])}
    places["the temporary folder"] = Path(probe.environ().get("TMPDIR") or "/tmp")
    found = {
        f"{name} ({place})" if name != str(place) else name: probe.disk(place)
        for name, place in places.items()
        if name != "/dev/shm" or place.is_dir()
    }
    return {name: usage for name, usage in found.items() if usage is not None}


def network(probe: Probe) -> Network:
    """Where gloo and NCCL would listen: on the first interface that GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME on CUDA)
    names, else gloo on what the host name resolves to (torch's ProcessGroupGloo::createDefaultDevice)."""
    environ, interfaces = probe.environ(), probe.interfaces()
    by_address = {address: i for i in interfaces for address in i.addresses}
    by_name = {i.name: i for i in interfaces}
    masters = probe.addresses(environ.get("MASTER_ADDR", ""))
    master = masters[0] if masters else ""
    toward = by_address.get(probe.route(master) or "") if master else None
    wanted = {
        variable: name
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        for name in _interface_names(variable, environ.get(variable, ""))
        if not any(known.startswith(name) for known in by_name)
    }
    gloo = environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    nccl = next(iter(_interface_names("NCCL_SOCKET_IFNAME", environ.get("NCCL_SOCKET_IFNAME", ""))), "")
    named = by_name.get(gloo) or next((i for i in interfaces if nccl and i.name.startswith(nccl)), None)
    if named is not None:
        chosen, address = named, next(iter(named.addresses), "")
    else:
        own = [a for a in probe.addresses(probe.host()) if a in by_address or a.startswith("127.")]
        address = own[0] if own else "127.0.0.1"  # gloo's own fallback
        chosen = by_address.get(address)
    loopback = address.startswith("127.") or address == "::1" or (chosen is not None and chosen.name == "lo")
    return Network(
        master=master,
        address=address,
        interface=None if chosen is None else chosen.name,
        loopback=loopback,
        toward=None if toward is None else toward.name,
        wanted=wanted,
        available=tuple(i.name for i in interfaces if i.up and i.addresses and i.name != "lo"),
        mtu=None if toward is None else toward.mtu,
        megabits=None if toward is None else toward.megabits,
    )


def _interface_names(variable: str, value: str) -> list[str]:
    """gloo takes exact names; NCCL prefixes, `=` before an exact list, `^` before what it shall not take."""
    if variable.startswith("NCCL"):
        if value.startswith("^"):
            return []
        value = value.removeprefix("=")
    return [name.partition(":")[0] for name in value.split(",") if name]


def new_uid() -> str:
    return f"{os.getpid()}-{os.urandom(8).hex()}"
