"""The line between the machines of a run: from the process that supervises each to that of machine 0.

Once a second every machine says that it lives, and what its ranks say of themselves; machine 0 judges, and passes
on how a rank or the job has ended. TCP alone would not do: a pulled cable or a machine without power leaves its
connections open for many minutes. So what counts is silence, measured by the listener's own turns: a second that
this process itself did not live through (suspended, swapped out) is not held against the others.

The port is the next after the main one, on machine 0's own address. Messages are lines of JSON of limited length;
nothing in them is run, and the worst that a stranger on that network can say is that the job has ended, which he
could as well say to torch's store."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tunesmith.culprit import Beat, Lost, Witness
from tunesmith.ending import Ending
from tunesmith.errors import MachineError
from tunesmith_launch.command import Cluster

INTERVAL = 1.0  # seconds between two messages
PATIENCE = (
    30.0  # seconds of silence that a network may take to mend itself; never more than a collective's time-out
)
_LIMIT = 4 << 20  # bytes of one message: 2,000 waiting ranks on a machine


def port(main: int) -> int:
    """The lease's port, from that of the run's store."""
    return main + 1 if main < 65535 else main - 1


class Wire:
    """Lines of JSON over a socket that is never waited for."""

    def __init__(self, line: socket.socket) -> None:
        line.setblocking(False)
        self.line = line
        self._unsent = b""
        self._unread = b""

    def say(self, message: dict[str, Any], *, always: bool) -> None:
        """Raises OSError where the connection is broken. Where the other end does not read, only what must not be
        lost (`always`) is kept for later."""
        if always or not self._unsent:
            self._unsent += json.dumps(message).encode() + b"\n"
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                self._unsent = self._unsent[self.line.send(self._unsent) :]

    def hear(self) -> Iterator[dict[str, Any]]:
        """What has come. Raises OSError or ValueError where the connection is over or no message of ours."""
        with contextlib.suppress(BlockingIOError):
            data = self.line.recv(1 << 20)
            if not data:
                raise ConnectionError("closed")
            *messages, self._unread = (self._unread + data).split(b"\n")
            if len(self._unread) > _LIMIT:
                raise ValueError("too long")
            for message in messages:
                yield json.loads(message)

    def close(self) -> None:
        """Lets what was said arrive: a socket closed with something unread would throw it away."""
        with contextlib.suppress(OSError):
            self.line.settimeout(0.5)
            self.line.sendall(self._unsent)
            self.line.shutdown(socket.SHUT_WR)
            end = time.monotonic() + 0.5
            while self.line.recv(1 << 16) and time.monotonic() < end:
                pass
        self.line.close()


@dataclass(slots=True)
class Machine:
    """Another machine. `silent`: seconds, None until it has called; `over`: it has said farewell; `closed`: its own
    end of the connection is closed."""

    number: int
    node: str = "?"
    silent: float | None = None
    over: bool = False
    closed: bool = False
    ranks: list[Witness] = field(default_factory=list[Witness])
    wire: Wire | None = None


class Lease:
    """This machine's end: machine 0 listens, the others call it. `told` is called with each ending that comes."""

    def __init__(
        self,
        cluster: Cluster,
        timeout: float,
        selector: selectors.BaseSelector,
        told: Callable[[Ending], None],
    ) -> None:
        assert cluster.num_machines > 1
        assert cluster.main_process_ip is not None
        assert cluster.main_process_port is not None
        self._cluster, self._selector, self._told = cluster, selector, told
        self._patience = min(timeout, PATIENCE)
        self._address = (cluster.main_process_ip, port(cluster.main_process_port))
        others = range(1, cluster.num_machines) if cluster.machine_rank == 0 else (0,)
        self.machines = {number: Machine(number) for number in others}
        self._listener = self._listen() if cluster.machine_rank == 0 else None
        self._endings: list[Ending] = []  # told to whoever calls
        self.node = socket.gethostname()

    def tick(self, ranks: list[Witness], passed: float) -> None:
        """Once a second, `passed` since the last time: says that this machine lives, and what its ranks do."""
        for machine in self.machines.values():
            if machine.silent is not None:
                machine.silent += min(passed, 1.5 * INTERVAL)
            calls = machine.wire is None and self._cluster.machine_rank != 0 and not machine.over
            if calls:
                self._call(machine)
            self._say(machine, {**self._name(), "ranks": [_plain(rank) for rank in ranks]}, always=calls)
            for ending in self._endings if calls else ():  # to a stranger it would not listen
                self._say(machine, {"ending": asdict(ending)}, always=True)

    def tell(self, ending: Ending, but: int | None = None) -> None:
        """Says on every machine, except `but`, how the job or a rank of it has ended."""
        if ending in self._endings:
            return
        self._endings.append(ending)
        for machine in self.machines.values():
            if machine.number != but:
                self._say(machine, {"ending": asdict(ending)}, always=True)

    def lost(self, *, suspicious: bool = False) -> list[Lost]:
        """The machines that have been silent for too long; `suspicious`: the job has failed already, so a machine
        counts as well that never called, has hung up, or has been silent for a few seconds."""
        patience = min(self._patience, 4 * INTERVAL) if suspicious else self._patience
        found: list[Lost] = []
        for m in self.machines.values():
            hung_up = m.silent is not None and m.wire is None
            silent = m.silent is not None and m.silent > patience
            if not m.over and (silent or (suspicious and (hung_up or m.silent is None))):
                found.append(
                    Lost(m.number, m.node, m.silent, m.number * self._cluster.processes_here, m.closed)
                )
        return found

    def close(self) -> None:
        """Says farewell."""
        for machine in self.machines.values():
            self._say(machine, {"over": True}, always=True)
        for machine in self.machines.values():
            if machine.wire is not None:
                self._selector.unregister(machine.wire.line)
                machine.wire.close()
                machine.wire = None
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _name(self) -> dict[str, Any]:
        return {"machine": self._cluster.machine_rank, "node": self.node}

    def _listen(self) -> socket.socket:
        host, number = self._address
        try:
            family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            listener = socket.create_server((str(address[0]), number), family=family, backlog=128)
        except OSError as error:
            raise MachineError(
                f"the lease of the run needs port {number} of {host} (the next after --main-process-port), on this "
                f"machine: {error.strerror}; choose another --main-process-port, or correct --main-process-ip"
            ) from None
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        return listener

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):  # gone again
            wire = Wire(self._listener.accept()[0])
            self._selector.register(wire.line, selectors.EVENT_READ, lambda: self._hear(wire))

    def _call(self, machine: Machine) -> None:
        with contextlib.suppress(OSError):  # the name is not known yet, or no route: again in a second
            family, kind, _, _, address = socket.getaddrinfo(*self._address, type=socket.SOCK_STREAM)[0]
            wire = machine.wire = Wire(socket.socket(family, kind))
            wire.line.connect_ex(address)
            self._selector.register(wire.line, selectors.EVENT_READ, lambda: self._hear(wire))

    def _say(self, machine: Machine, message: dict[str, Any], *, always: bool) -> None:
        if machine.wire is not None:
            try:
                machine.wire.say(message, always=always)
            except OSError:
                self._hang_up(machine.wire)

    def _hear(self, wire: Wire) -> None:
        try:
            for message in wire.hear():
                self._heard(wire, message)
        except OSError as error:
            for machine in self.machines.values():
                # said by its kernel, unlike a time-out of our own
                machine.closed |= machine.wire is wire and isinstance(error, ConnectionError)
            self._hang_up(wire)
        except (ValueError, KeyError, TypeError) as error:
            what = f"{type(error).__name__}: {error}"
            print(
                f"the lease was sent something else ({what}): is tunesmith's version everywhere the same?",
                file=sys.stderr,
            )
            self._hang_up(wire)

    def _heard(self, wire: Wire, message: dict[str, Any]) -> None:
        if "machine" in message:
            machine = self.machines[message["machine"]]
            if machine.wire is not wire:
                if machine.wire is not None:
                    self._hang_up(machine.wire)
                machine.wire = wire
                for ending in self._endings:
                    self._say(machine, {"ending": asdict(ending)}, always=True)
            machine.node = str(message["node"])
            machine.ranks = [_witness(machine.node, values) for values in message["ranks"]]
        else:
            machine = next((m for m in self.machines.values() if m.wire is wire), None)
            if machine is None:
                raise ValueError("a stranger")
        machine.silent, machine.closed = 0.0, False
        if "ending" in message:
            ending = Ending(**message["ending"])
            if self._cluster.machine_rank == 0:
                self.tell(ending, but=machine.number)
            self._told(ending)
        if "over" in message:
            machine.over = True

    def _hang_up(self, wire: Wire) -> None:
        """Not the end of the machine: it may call again, or a caller be called again, until it was silent for long."""
        for machine in self.machines.values():
            if machine.wire is wire:
                machine.wire = None
        with contextlib.suppress(KeyError):
            self._selector.unregister(wire.line)
        wire.line.close()


def _plain(rank: Witness) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "pid": rank.pid,
        "state": rank.state,
        "silent": round(rank.silent, 1),
        "words": rank.words,
        "beat": rank.beat.to_json(),
    }


def _witness(node: str, values: dict[str, Any]) -> Witness:
    beat = Beat.from_json(values["beat"])
    state = values["state"]
    if state not in {"running", "stopped", "gone", "failed"}:
        raise ValueError(state)
    return Witness(
        int(values["rank"]),
        int(values["pid"]),
        node,
        state,
        float(values["silent"]),
        beat,
        str(values["words"]),
    )
