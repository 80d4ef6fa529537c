"""The line between machines (tunesmith_launch.lease): both ends in this process, over loopback, with no clock but
the test's: `tick` is told what time has passed."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tunesmith.culprit import Beat, Collective, Witness
from tunesmith.ending import Ending
from tunesmith.errors import MachineError
from tunesmith_launch.command import Cluster
from tunesmith_launch.lease import Lease, port

TIMEOUT = 10.0
STOPPED = Ending(4, "no use", 1, 12)


@dataclass
class End:
    """One machine."""

    lease: Lease
    selector: selectors.BaseSelector
    told: list[Ending] = field(default_factory=list[Ending])

    def until(self, done: Callable[[], bool]) -> None:
        for _ in range(100):
            if done():
                return
            for key, _ in self.selector.select(0.1):
                key.data()
        raise AssertionError("it did not come")


@pytest.fixture
def machines() -> Iterator[Callable[..., list[End]]]:
    made: list[End] = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        main = free.getsockname()[1] - 1

    def make(count: int) -> list[End]:
        for rank in range(count):
            selector, told = selectors.DefaultSelector(), list[Ending]()
            cluster = Cluster(2 * count, count, rank, "127.0.0.1", main)
            made.append(End(Lease(cluster, TIMEOUT, selector, told.append), selector, told))
        return made

    yield make
    for end in made:
        end.lease.close()
        end.selector.close()


def meet(first: End, *others: End) -> None:
    for number, other in enumerate(others, 1):
        machine = first.lease.machines[number]
        machine.ranks = []
        other.lease.tick([], 1.0)
        first.until(lambda machine=machine: machine.wire is None and bool(first.selector.select(0.1)))
        other.lease.tick([witness(2 * number)], 1.0)
        first.until(lambda machine=machine: bool(machine.ranks))


def witness(rank: int) -> Witness:
    return Witness(rank, 7, None, "running", 0.5, Beat(3, Collective("0", 5, "barrier"), 2.0, {"0": 5}))


def test_machine_0_hears_of_all_ranks_and_passes_on_how_one_ended(machines: Any) -> None:
    first, second, third = machines(3)
    meet(first, second, third)
    for machine, other in ((first.lease.machines[1], second), (first.lease.machines[2], third)):
        (rank,) = machine.ranks
        assert (rank.rank, rank.node, rank.beat) == (2 * machine.number, other.lease.node, witness(0).beat)
    second.lease.tell(STOPPED)
    first.until(lambda: first.told == [STOPPED])
    third.until(lambda: third.told == [STOPPED])
    assert second.told == []


def test_an_ending_waits_for_who_calls_later(machines: Any) -> None:
    first, second = machines(2)
    first.lease.tell(STOPPED)
    second.lease.tell(Ending(6, "other", 3, 1))
    second.lease.tick([], 1.0)
    first.until(lambda: len(first.told) == 1)
    second.lease.tick([], 1.0)
    first.until(lambda: first.lease.machines[1].wire is not None)
    second.until(lambda: second.told == [STOPPED])


def test_silence(machines: Any) -> None:
    first, second = machines(2)
    assert not first.lease.lost()  # it may still be starting
    assert str(first.lease.lost(suspicious=True)[0]) == "machine 1 never called"
    meet(first, second)
    for _ in range(4):
        first.lease.tick([], 1.0)
    assert not first.lease.lost()
    assert not first.lease.lost(suspicious=True)
    first.lease.tick([], 1.0)
    assert [lost.first_rank for lost in first.lease.lost(suspicious=True)] == [2]
    first.lease.tick([], 1000.0)  # this process itself was suspended
    assert not first.lease.lost()
    for _ in range(4):
        first.lease.tick([], 1.0)
    (lost,) = first.lease.lost()
    assert "nothing was heard from it for 10 s" in str(lost)
    second.lease.tick([], 1.0)
    first.until(lambda: not first.lease.lost())


def test_hanging_up_with_and_without_a_farewell(machines: Any) -> None:
    first, second = machines(2)
    meet(first, second)
    wire = second.lease.machines[0].wire
    assert wire is not None
    wire.line.shutdown(socket.SHUT_RDWR)
    first.until(lambda: first.lease.machines[1].wire is None)
    assert not first.lease.lost()  # it may call again
    assert "it has closed the connection" in str(first.lease.lost(suspicious=True)[0])
    second.until(lambda: second.lease.machines[0].wire is None)
    meet(first, second)
    assert not first.lease.lost(suspicious=True)
    second.lease.close()
    first.until(lambda: first.lease.machines[1].over)
    for _ in range(20):
        first.lease.tick([], 1.0)
    assert not first.lease.lost(suspicious=True)


@pytest.mark.parametrize(
    "said",
    [b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"ending": {}}\n', b'{"machine": 7}\n', b'{"over": true}\n'],
)
def test_a_stranger_is_hung_up_on(machines: Any, said: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = machines(2)
    with socket.create_connection(first.lease._address) as stranger:
        stranger.sendall(said)
        stranger.settimeout(0.05)
        gone = []

        def hung_up() -> bool:
            try:
                gone.append(stranger.recv(1))
            except TimeoutError:
                return False
            except ConnectionError:
                gone.append(b"")
            return True

        first.until(hung_up)
        assert gone == [b""]
    assert first.told == []
    assert "the lease was sent something else" in capsys.readouterr().err
    meet(first, second)


def test_a_port_that_is_taken_is_named(machines: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        cluster = Cluster(2, 2, 0, "127.0.0.1", number - 1)
        with pytest.raises(MachineError, match=rf"port {number} of 127\.0\.0\.1 .*--main-process-port"):
            Lease(cluster, TIMEOUT, selectors.DefaultSelector(), lambda ending: None)


def test_the_port() -> None:
    assert (port(29500), port(65535)) == (29501, 65534)
