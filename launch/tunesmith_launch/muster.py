"""The machines of a run meet before anything is started on them. torchrun's agents, which come next, wait ten minutes
for a machine that is missing, for ever where two have the same rank, and say of neither who it is.

Machine 0 listens on the port that the ranks' store will have, and every machine, machine 0 too, calls it at the
address that was given: so that address, that port and the way to it are tried as they will be used. One line of
JSON each way; nothing in it is run."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from tunesmith import __version__
from tunesmith.errors import MachineError
from tunesmith_launch.command import Cluster

_SETTLE = 1.0  # seconds in which more of a fault may show, once some is seen
_AGAIN = 0.3  # seconds between two calls
_VERDICT = 5.0  # seconds that the verdict may come after machine 0's own time
_LINE = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Hello:
    """What a machine says of itself."""

    machine: int
    machines: int
    processes: int
    host: str
    version: str
    uid: str


def muster(cluster: Cluster, wait: float, notice: float = 10.0) -> None:
    """Until all machines are there, `wait` seconds at most; after `notice` seconds machine 0 says for whom it waits.
    Raises MachineError, on every machine alike, that names each machine and the fix."""
    assert cluster.main_process_ip is not None
    assert cluster.main_process_port is not None
    address, port = cluster.main_process_ip, cluster.main_process_port
    me = Hello(
        cluster.machine_rank,
        cluster.num_machines,
        cluster.num_processes,
        platform.node(),
        __version__,
        f"{os.getpid()}-{os.urandom(6).hex()}",
    )
    desk = _Desk(port, me, wait, notice) if cluster.machine_rank == 0 else None
    if desk is not None:
        desk.start()
    try:
        findings = _call(address, port, me, wait, notice)
    finally:
        if desk is not None:
            desk.close()
    if findings:
        raise MachineError("\n".join(findings))


# every machine


def _call(address: str, port: int, me: Hello, wait: float, notice: float) -> list[str]:
    """Machine 0's verdict."""
    started, said = time.monotonic(), False
    end = started + wait
    while True:
        try:
            with socket.create_connection((address, port), max(0.5, end - time.monotonic())) as line:
                line.settimeout(max(0.5, end - time.monotonic()) + _VERDICT)
                line.sendall(json.dumps(asdict(me)).encode() + b"\n")
                return _read_verdict(line)
        except (ConnectionError, socket.gaierror, TimeoutError, ValueError, OSError) as error:
            reason = _reason(error)
        what = f"machine 0 does not answer at {address}:{port} ({reason})"
        told = _line(me, what, _unreached(address, me))
        if time.monotonic() >= end:
            return [told]
        if time.monotonic() >= started + notice and not said:
            said = True
            print(f"waiting: {told}", file=sys.stderr, flush=True)
        time.sleep(_AGAIN)


def _read_verdict(line: socket.socket) -> list[str]:
    """Raises ValueError where what answers is not machine 0."""
    with line.makefile("rb") as words:
        text = words.readline(_LINE)
    if not text:
        raise ConnectionError("it hung up")
    values = json.loads(text)
    if not isinstance(values, dict) or "findings" not in values:
        raise ValueError("no verdict")
    return [str(one) for one in values["findings"]]


def _reason(error: Exception) -> str:
    match error:
        case TimeoutError():
            return "no answer"
        case socket.gaierror():
            return "the name has no address on this machine"
        case ValueError():
            return "something else listens there"
        case OSError():
            return error.strerror or str(error)
        case _:
            return str(error)


def _unreached(address: str, me: Hello) -> str:
    try:
        places = {str(info[4][0]) for info in socket.getaddrinfo(address, None)}
    except OSError:
        return "name it in /etc/hosts or DNS on this machine, or give --main-process-ip as a number"
    if any(place.startswith("127.") or place == "::1" for place in places):
        return f"{address} is loopback, every machine's own: give the address of machine 0 in the machines' network"
    if me.machine == 0:
        return "this machine has rank 0: give its own address as --main-process-ip, or exchange the machine ranks"
    return (
        "start machine 0 with --machine-rank 0 and the same address and port, and let its firewall pass the port; if "
        "it runs, this is not its address"
    )


def _line(of: Hello, what: str, fix: str) -> str:
    return f"✗ {of.host} (machine {of.machine}): {what} → {fix}"


# machine 0


@dataclass(slots=True)
class _Caller:
    line: socket.socket
    hello: Hello
    came: float = field(default_factory=time.monotonic)


class _Desk(threading.Thread):
    """Where the machines report. Raises MachineError where the port is taken."""

    def __init__(self, port: int, me: Hello, wait: float, notice: float) -> None:
        super().__init__(daemon=True)
        self._me, self._wait, self._notice = me, wait, notice
        self._callers: list[_Caller] = []
        self._over = threading.Event()
        try:
            self._listener = socket.create_server(("", port), backlog=256)
        except OSError:
            from tunesmith.preflight.store import port_taken

            raise port_taken(f"{me.host} (machine 0)", port) from None

    def run(self) -> None:
        findings = self._collect()
        self._listener.close()  # before the word to go: the agent needs the port
        text = json.dumps({"findings": findings}).encode() + b"\n"
        for caller in self._callers:
            try:
                caller.line.sendall(text)
                caller.line.close()
            except OSError:
                continue  # it is gone, and will be missed soon enough

    def close(self) -> None:
        """Once this machine has its verdict, which it may have from another that is machine 0 too."""
        self._over.set()
        self.join(_VERDICT)

    def _collect(self) -> list[str]:
        started, said, faulty_since = time.monotonic(), False, None
        while not self._over.is_set():
            self._accept()
            hellos = [caller.hello for caller in self._callers]
            faults, now = disagreements(self._me, hellos), time.monotonic()
            absent = missing(self._me, hellos)
            if faults:
                faulty_since = faulty_since or now
                if now - faulty_since > _SETTLE:
                    return faults
            elif not absent:
                return []
            elif now - started > self._wait:
                return _absent(absent, now - started)
            elif now - started > self._notice and not said:
                said = True
                for one in _absent(absent, now - started):
                    print(f"waiting: {one}", file=sys.stderr, flush=True)
        return []

    def _accept(self) -> None:
        self._listener.settimeout(0.1)
        try:
            line, _ = self._listener.accept()
        except TimeoutError:
            return
        try:
            line.settimeout(2.0)
            text = line.makefile("rb").readline(_LINE)
            self._callers.append(_Caller(line, Hello(**json.loads(text))))
        except (OSError, ValueError, TypeError):
            line.close()  # a stranger


def _absent(machines: Sequence[int], seconds: float) -> list[str]:
    return [
        f"✗ machine {number}: did not come within {seconds:.0f} s → start tunesmith there with --machine-rank {number} "
        "and the same address and port; see its output where it runs"
        for number in machines
    ]


def disagreements(first: Hello, hellos: Sequence[Hello]) -> list[str]:
    """Between machine 0 and those that called: ranks claimed twice, other numbers of machines or processes, other
    versions."""
    found: list[str] = []
    by_rank: dict[int, Hello] = {first.machine: first}
    for hello in hellos:
        other = by_rank.setdefault(hello.machine, hello)
        if other.uid != hello.uid:
            where = f"and on {other.host}" if other.host != hello.host else "and by another process there"
            fix = f"give each machine another --machine-rank, 0 to {first.machines - 1}"
            found.append(_line(hello, f"machine rank {hello.machine} is claimed here {where}", fix))
        for name, own, usual in (
            ("--num-machines", hello.machines, first.machines),
            ("--num-processes", hello.processes, first.processes),
        ):
            if own != usual:
                found.append(
                    _line(hello, f"{name} is {own}, on machine 0 {usual}", f"give {name} alike everywhere")
                )
        if hello.version != first.version:
            what = f"tunesmith is {hello.version}, on machine 0 {first.version}"
            found.append(_line(hello, what, f"pip install tunesmith=={first.version} there"))
    return list(dict.fromkeys(found))


def missing(first: Hello, hellos: Sequence[Hello]) -> list[int]:
    """Machine 0 itself is missing until its own call came through the address that was given."""
    return sorted(set(range(first.machines)) - {hello.machine for hello in hellos})
