"""The links between nodes, before any collective: each node reaches each other one at the address at which its ranks
would, and the bytes that come over a plain TCP connection in a moment are counted. A collective over a dead link
hangs, and does not say which link it was; this does. RDMA is not measured: only that the addresses are reached."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from tunesmith.preflight.compare import Roll, node_name
from tunesmith.preflight.exchange import Meeting
from tunesmith.preflight.findings import Finding, Level, error

_CONNECT, _TRANSFER = 4.0, 5.0  # seconds at most
_SPAN = 0.12  # seconds of sending
_CHUNK = bytes(256 * 1024)
_ROUNDS = 15  # partners of each node; all of them up to 16 nodes
_AGAIN, _SUSPECTS = 2, 4  # times that each of so many slow links is measured alone
_ROUND_LIMIT = 12.0
SLOWER = 4.0  # times slower than its like is a finding
LEAST_MEGABITS = 200.0
_NOMINAL_SHARE, _NOMINAL_CAP = 0.15, 10_000.0  # one stream does not fill a faster interface


@dataclass(frozen=True, slots=True)
class Link:
    """From one leader's rank to another's: megabits per second and milliseconds there and back, or `fault`."""

    source: int
    target: int
    megabits: float = 0.0
    milliseconds: float = 0.0
    fault: str = ""


def measure(meeting: Meeting, address: str | None, megabits: int | None, level: Level) -> list[Finding]:
    """The same findings on every rank. `address` is where this node's ranks are reached, None where the ranks need no
    network; `megabits` its interface's own claim; `level` is that of a slow link."""
    if not meeting.claim.leads or address is None:
        return meeting.decide("links", None, lambda _: [], _leaders)
    rank = meeting.claim.rank
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(address))
        threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        meeting.tell(f"links/at/{rank}", [address, listener.getsockname()[1], megabits])
        if meeting.is_first:
            at = {claim.rank: meeting.hear(f"links/at/{claim.rank}") for claim in meeting.leaders()}
            meeting.tell("links/plan", at)
        plan = {int(key): value for key, value in meeting.hear("links/plan").items()}
        found: list[Link] = []
        for number, pairs in enumerate(schedule(sorted(plan), _ROUNDS)):
            partners = [b if a == rank else a for a, b in pairs if rank in (a, b)]
            found += [send(rank, partner, *plan[partner][:2]) for partner in partners]
            meeting.reach(f"links/round/{number}", len(plan), _ROUND_LIMIT)
        found += _again(meeting, plan, found)
        said = [asdict(link) for link in found]
        return meeting.decide("links", said, lambda values: _judge(meeting, values, plan, level), _leaders)


def _leaders(roll: Roll) -> list[int]:
    return sorted(claim.rank for claim in roll.claims if claim.leads)


def schedule(ranks: Sequence[int], rounds: int) -> list[list[tuple[int, int]]]:
    """At most `rounds` rounds of disjoint pairs, none twice: the circle method of tournaments, in which after n − 1
    rounds each of n (even) has met each."""
    circle: list[int | None] = [*ranks, *([None] if len(ranks) % 2 else [])]
    made: list[list[tuple[int, int]]] = []
    for _ in range(min(rounds, len(circle) - 1)):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        made.append([(a, b) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return made


def _again(meeting: Meeting, plan: Mapping[int, Sequence[Any]], found: Sequence[Link]) -> list[Link]:
    """The slow ones once more, each alone: neighbours' traffic or a busy processor may have been why."""
    rank = meeting.claim.rank
    meeting.tell(f"links/first/{rank}", [asdict(link) for link in found])
    if meeting.is_first:
        everyone = [Link(**one) for other in plan for one in meeting.hear(f"links/first/{other}")]
        slow = [[link.source, link.target] for link, _ in slow_links(everyone, _nominal(plan))]
        meeting.tell("links/slow", slow[:_SUSPECTS])
    more: list[Link] = []
    for number, (source, target) in enumerate(meeting.hear("links/slow") * _AGAIN):
        if source == rank:
            more.append(send(source, target, *plan[target][:2]))
        meeting.reach(f"links/again/{number}", len(plan), _ROUND_LIMIT)
    return more


def _nominal(plan: Mapping[int, Sequence[Any]]) -> dict[int, float]:
    return {rank: float(megabits) for rank, (_, _, megabits) in plan.items() if megabits}


def _listen(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family, backlog=64)


def _serve(listener: socket.socket) -> None:
    """Until the listener is closed."""
    while True:
        try:
            line, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_receive, args=(line,), daemon=True).start()


def _receive(line: socket.socket) -> None:
    """Echoes one byte, then counts until the sender is done: [bytes, seconds from the first to the last]."""
    with line:
        line.settimeout(_TRANSFER)
        try:
            line.sendall(line.recv(1))
            count, first, buffer = 0, None, bytearray(1 << 20)
            while size := line.recv_into(buffer):
                first = first or time.perf_counter()
                count += size
            seconds = time.perf_counter() - (first or time.perf_counter())
            line.sendall(json.dumps([count, seconds]).encode())
        except OSError:
            return  # the sender says what it met


def send(source: int, target: int, address: str, port: int) -> Link:
    """One measurement from this node."""
    try:
        with socket.create_connection((address, port), timeout=_CONNECT) as line:
            line.settimeout(_TRANSFER)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            started = time.perf_counter()
            line.sendall(b"!")
            if not line.recv(1):
                return Link(source, target, fault="the connection was closed at once")
            milliseconds = (time.perf_counter() - started) * 1e3
            end = time.perf_counter() + _SPAN
            while time.perf_counter() < end:
                line.sendall(_CHUNK)
            line.shutdown(socket.SHUT_WR)
            count, seconds = json.loads(line.recv(200) or b"[0, 0]")
    except TimeoutError:
        return Link(source, target, fault=f"no answer from {address} in time")
    except (OSError, ValueError) as caught:
        return Link(source, target, fault=f"{address} is not reached: {getattr(caught, 'strerror', caught)}")
    if not count or not seconds:
        return Link(source, target, fault="nothing came through")
    return Link(source, target, count * 8e-6 / seconds, milliseconds)


def best(links: Sequence[Link]) -> list[Link]:
    """The fastest of each link's measurements."""
    kept: dict[tuple[int, int], Link] = {}
    for link in links:
        before = kept.setdefault((link.source, link.target), link)
        if link.megabits > before.megabits:
            kept[link.source, link.target] = link
    return list(kept.values())


def slow_links(links: Sequence[Link], nominal: Mapping[int, float]) -> list[tuple[Link, str]]:
    """The slow ones, each with what it is compared with: an absolute least, the interfaces' own speed, the way back,
    the median of all links."""
    sound = [link for link in best(links) if not link.fault]
    speeds = {(link.source, link.target): link.megabits for link in sound}
    middle = median(speeds.values()) if len(speeds) > 2 else 0.0
    found: list[tuple[Link, str]] = []
    for link in sound:
        ends = [nominal[rank] for rank in (link.source, link.target) if rank in nominal]
        wire = min([*ends, _NOMINAL_CAP]) if ends else 0.0
        back = speeds.get((link.target, link.source), 0.0)
        if link.megabits * SLOWER < middle:
            found.append((link, f"the median of all links is {_rate(middle)}"))
        elif link.megabits * SLOWER < back:
            found.append((link, f"the way back has {_rate(back)}"))
        elif link.megabits < _NOMINAL_SHARE * wire:
            found.append((link, f"the interface says {_rate(min(ends))}"))
        elif link.megabits < LEAST_MEGABITS:
            found.append((link, f"training over it needs {_rate(LEAST_MEGABITS)} at least"))
    return found


def _judge(
    meeting: Meeting, values: Mapping[int, Any], plan: Mapping[int, Sequence[Any]], level: Level
) -> list[Finding]:
    names = {claim.rank: node_name(claim) for claim in meeting.leaders()}
    links = [Link(**one) for said in values.values() for one in said]
    meeting.tell("links/figures", summary(links))
    return list(link_findings(links, names, _nominal(plan), level))


def link_findings(
    links: Sequence[Link], names: Mapping[int, str], nominal: Mapping[int, float], level: Level
) -> Iterator[Finding]:
    """Dead links, then slow ones."""
    for link in best(links):
        if link.fault:
            both = f"{names[link.source]} → {names[link.target]}"
            fix = "open all ports between the nodes in their firewalls, and see whether GLOO_SOCKET_IFNAME is right"
            yield error(both, link.fault, fix)
    for link, than in slow_links(links, nominal):
        both = f"{names[link.source]} → {names[link.target]}"
        fix = "see ethtool, the cable, the switch's port and other traffic on this way, or leave the node out"
        yield Finding(level, both, f"{_rate(link.megabits)}; {than}", fix, 3 if level == "error" else 0)


def summary(links: Sequence[Link]) -> dict[str, float]:
    sound = [link for link in best(links) if not link.fault]
    if not sound:
        return {}
    return {
        "links": len(sound),
        "slowest_megabits": round(min(link.megabits for link in sound), 1),
        "median_megabits": round(median(link.megabits for link in sound), 1),
        "median_milliseconds": round(median(link.milliseconds for link in sound), 3),
    }


def _rate(megabits: float) -> str:
    return f"{megabits / 1e3:.2f} Gbit/s" if megabits >= 1e3 else f"{megabits:.0f} Mbit/s"
