"""The network interface over which the machines of a run reach each other. gloo takes the one of the host's own
name, which Debian's /etc/hosts calls 127.0.1.1, and NCCL the first that is up: both can be one that the other
machines do not reach, and the run then hangs. Here it is the interface of the route to machine 0."""

from __future__ import annotations

import ipaddress
import socket
import sys
import time
from collections.abc import Mapping, Sequence

from tunesmith.errors import MachineError, UserError

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_WAIT = 600.0  # seconds; the name of a Kubernetes pod has no address before the pod is placed


def toward(host: str, port: int, *, wait: float = _WAIT) -> str | None:
    """The name of the interface of the route to `host` (on machine 0, where it is its own address: the one that
    has it); None where this cannot be asked, which is everywhere but on Linux. A name that cannot be resolved is
    asked for again for `wait` seconds. Raises MachineError, and UserError for what is no name at all."""
    if sys.platform != "linux":
        return None
    import psutil

    sources = [source for place in _resolve(host, port, wait) if (source := _source(place)) is not None]
    held = {name: [item.address for item in items] for name, items in psutil.net_if_addrs().items()}
    return choose(host, sources, held)


def choose(host: str, sources: Sequence[str], held: Mapping[str, Sequence[str]]) -> str:
    """The interface that holds the first of `sources`, the local addresses from which packets to `host` leave;
    `held` are the addresses of each interface. A loopback interface only if `host` itself says loopback. Raises
    MachineError."""
    usable = [source for source in sources if _is_loopback(host) or not _is_loopback(source)]
    for source in usable:
        for name, addresses in held.items():
            if source in {address.partition("%")[0] for address in addresses}:
                return name
    if sources and not usable:
        why = f"is {sources[0]} on this machine (see /etc/hosts), which no other machine reaches"
    elif sources:
        why = f"is reached from {sources[0]}, which no network interface of this machine holds"
    else:
        why = "cannot be reached from this machine: there is no route to it"
    raise MachineError(
        f"--main-process-ip {host} {why}; give the address of machine 0 in the machines' network, or set "
        f"{' and '.join(VARIABLES)} to the interface's name"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _resolve(host: str, port: int, wait: float) -> list[tuple[socket.AddressFamily, tuple[object, ...]]]:
    end, said = time.monotonic() + wait, False
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
            return [(family, address) for family, _, _, _, address in found]
        except UnicodeError:
            raise UserError(f"--main-process-ip {host} is not a host name or an address") from None
        except OSError as error:
            if time.monotonic() >= end:
                raise MachineError(f"--main-process-ip {host} has no address: {error.strerror}") from None
        if not said:
            print(f"waiting until {host} (machine 0) has an address", file=sys.stderr, flush=True)
            said = True
        time.sleep(1)


def _source(place: tuple[socket.AddressFamily, tuple[object, ...]]) -> str | None:
    """The local address of the route; nothing is sent: connecting a UDP socket only looks the route up."""
    family, address = place
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)
        except OSError:
            return None
        return str(probe.getsockname()[0]).partition("%")[0]
