"""The key-value store of the ranks (torch's TCPStore), reached without any collective and without ever hanging: its
own calls wait without end where what answers is no store, or is frozen, so they run in a thread that is given up."""

from __future__ import annotations

import errno
import socket
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from tunesmith import torch_threads
from tunesmith.errors import MachineError, UserError
from tunesmith.preflight.probe import Probe

T = TypeVar("T")

_ANSWER = 15.0  # seconds for a store that accepts the connection to say that it is one


class Store(Protocol):
    """What is used of torch's. A key that is read is known to be there (`check`)."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def append(self, key: str, value: str) -> None: ...
    def add(self, key: str, amount: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...
    def compare_set(self, key: str, expected: str, value: str) -> bytes: ...


def bounded(work: Callable[[], T], seconds: float, late: Callable[[], Exception]) -> T:
    """What `work` returns or raises; `late()` is raised where it takes longer, and its thread is left behind."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # noqa: BLE001 (raised in the caller's thread)
            failed.append(error)

    thread = torch_threads.start(run)
    thread.join(seconds)
    if thread.is_alive():
        raise late()
    if failed:
        raise failed[0]
    return done[0]


def open_store(probe: Probe, node: str, wait: float, notice: float) -> Store:
    """The store of this run, under a prefix of ours. It is the one that `init_process_group` uses later: the agent's
    where torchrun or accelerate has one, else rank 0's own, which a second TCPStore of this process shares
    (`multi_tenant`), so the returned object is kept until the run ends. Waits `wait` seconds for rank 0, and says so
    after `notice`. Raises MachineError that names `node`, and UserError for an environment that no launcher made."""
    import torch.distributed as dist

    stores: Any = dist  # torch exports its stores without types

    environ = probe.environ()
    address, port, rank, world_size = _endpoint(environ)
    hosts = rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{address}:{port}"
    if not hosts:
        _reach(node, address, port, wait, notice, probe)

    def connect() -> Any:
        # not by `rendezvous`: that waits on rank 0 for every rank, and cannot say which one is missing
        return stores.TCPStore(
            address,
            port,
            world_size,
            is_master=hosts,
            timeout=timedelta(seconds=wait),
            wait_for_workers=False,
            multi_tenant=True,
        )

    def late() -> Exception:
        return MachineError(
            f"✗ {node}: what answers at {where} is not the store of a run → another process has the port: give "
            "another --main-process-port on every machine"
        )

    try:
        store = bounded(connect, wait + _ANSWER if hosts else _ANSWER, late)
    except RuntimeError as error:
        if errno.errorcode[errno.EADDRINUSE] in str(error):
            raise port_taken(node, port) from None
        if isinstance(error, MachineError):
            raise
        raise MachineError(
            f"✗ {node}: no store at {where} ({str(error).partition(chr(10))[0]}) → {_not_here(probe, address)}"
        ) from None
    restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefixed: Any = stores.PrefixStore(f"tunesmith/preflight/{restart}", store)
    return prefixed


def _endpoint(environ: Mapping[str, str]) -> tuple[str, int, int, int]:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE") if not environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={environ.get('WORLD_SIZE')} is set, but not {', '.join(missing)}: start several processes by "
            "`tunesmith train RECIPE --num-processes N`, `accelerate launch` or `torchrun`"
        )
    return (
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        int(environ["RANK"]),
        int(environ["WORLD_SIZE"]),
    )


def _reach(node: str, address: str, port: int, wait: float, notice: float, probe: Probe) -> None:
    """Until something accepts connections there. The TCPStore's own attempts fill the screen."""
    started, said = time.monotonic(), False
    end = started + wait
    while True:
        if not probe.addresses(address):
            reason = "the name has no address on this node"
            fix = "name it in /etc/hosts or DNS, or give --main-process-ip as a number"
        else:
            try:
                socket.create_connection((address, port), timeout=max(0.1, end - time.monotonic())).close()
                return
            except OSError as error:
                reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
                fix = "is machine 0 started, is this its address, and does its firewall let the port through?"
        line = f"✗ {node}: rank 0 is not reached at {address}:{port} ({reason}) → {fix}"
        if time.monotonic() >= end:
            raise MachineError(line)
        if time.monotonic() >= started + notice and not said:
            said = True
            print(f"waiting: {line}", file=sys.stderr, flush=True)
        time.sleep(0.2)


def _not_here(probe: Probe, address: str) -> str:
    own = {one for interface in probe.interfaces() for one in interface.addresses}
    if own.isdisjoint(probe.addresses(address)):
        return f"{address} is not an address of this node, which has rank 0: exchange the machine ranks, or name it"
    return "see the firewall of this node"


def port_taken(node: str, port: int) -> MachineError:
    """Says who listens there, where that may be known."""
    import psutil

    holder = ""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid:
                    holder = f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
                break
    except psutil.Error:
        pass
    return MachineError(
        f"✗ {node}: port {port} is taken{holder} → end that process, or give another --main-process-port on every "
        "machine"
    )
