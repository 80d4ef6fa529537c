"""Hosts on one machine: network namespaces joined by a switch, each with its own address, host name and /etc/hosts.

Nothing outside the namespaces is touched: both ends of every cable lie in a namespace of ours, so addresses cannot
collide with the machine's or with those of a test in another process. A namespace's name carries the process that
made it; what a killed test process has left behind is removed when the next one makes its own.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

_PREFIX = "tunesmith"
_TOOLS = ("ip", "unshare", "nsenter", "mount", "hostname")
_OWNED = re.compile(rf"{_PREFIX}-(\d+)-(\d+)-\d+-")
_COUNTER = itertools.count()


class UnavailableError(Exception):
    """This machine cannot have such hosts; says why."""


@dataclass(frozen=True, slots=True)
class Node:
    """One host. `address` is IPv4, of its interface `interface`; `name` is its host name, known to all hosts."""

    name: str
    address: str
    namespace: str
    holder: subprocess.Popen[str]  # keeps the host's name and mounts while nothing runs on it
    interface: str = "eth0"


class Nodes:
    """A context with `count` hosts `nodea`, `nodeb`, …: `nodes[0]`, `nodes[1]`, …; unpacks like a tuple. Raises
    UnavailableError where this machine lacks root, iproute2 or the kernel's support."""

    def __init__(self, count: int = 2) -> None:
        assert 1 <= count <= 26
        self._count = count
        self.owner = f"{_PREFIX}-{os.getpid()}-{_started(os.getpid())}-{next(_COUNTER)}"
        self._switch = f"{self.owner}-switch"
        self._nodes: list[Node] = []
        self._folder = Path(tempfile.mkdtemp(prefix="nodes-"))

    def __enter__(self) -> Nodes:
        try:
            if reason := why_unavailable():
                raise UnavailableError(reason)
            _sweep()
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def __getitem__(self, number: int) -> Node:
        return self._nodes[number]

    def __len__(self) -> int:
        return len(self._nodes)

    def start(
        self,
        node: Node,
        argv: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        *,
        stdout: int | IO[str] | None = subprocess.PIPE,
        stderr: int | IO[str] | None = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        """Runs a program on the host, as the leader of a process group; `pid` is the program's own. `env` is laid
        over this process's environment. All that it leaves behind is ended with the host."""
        enter = ["nsenter", f"--target={node.holder.pid}", "--net", "--uts", "--mount", "--"]
        # the shell changes the folder: entering the host's mounts leads to their root
        shell = ["sh", "-c", 'cd "$0" && exec "$@"', str(cwd or Path.cwd())]
        return subprocess.Popen(
            [*enter, *shell, *map(str, argv)],
            env=os.environ | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            process_group=0,
        )

    def run(self, node: Node, argv: Sequence[str | Path], timeout: float = 60.0) -> str:
        """Runs a short program on the host to its end; its stdout."""
        process = self.start(node, argv)
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == 0, err
        return out

    def link_down(self, node: Node) -> None:
        """Pulls the host's cable at the switch: packets vanish, no connection is told."""
        _ip("-n", self._switch, "link", "set", node.name, "down")

    def link_up(self, node: Node) -> None:
        _ip("-n", self._switch, "link", "set", node.name, "up")

    def slow(self, mbit: float, *nodes: Node) -> None:
        """Limits what the hosts (all, where none is given) send, in megabit/s. Again replaces the limit."""
        for node in nodes or self._nodes:
            queue = ["qdisc", "replace", "dev", node.interface, "root", "tbf"]
            _run(
                "tc", "-n", node.namespace, *queue, "rate", f"{mbit}mbit", "burst", "32kb", "latency", "50ms"
            )

    def mount_tmpfs(self, node: Node, folder: Path, size: str) -> None:
        """Lays an empty file system of `size` bytes ("64m") over an existing folder, on this host alone."""
        self.run(node, ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder])

    def pids(self, node: Node) -> list[int]:
        """The processes on the host, whatever started them."""
        return [pid for pid in _pids(node.namespace) if pid != node.holder.pid]

    def kill(self, node: Node) -> None:
        """SIGKILL for every process on the host. Its kernel lives on and closes their connections; a host without
        power is `link_down` first."""
        _kill(lambda: self.pids(node))

    # building and removing

    def _build(self) -> None:
        names = _names(self._count)
        addresses = [f"10.77.0.{i + 1}" for i in range(self._count)]
        hosts = self._folder / "hosts"
        lines = [f"{address} {name}" for address, name in zip(addresses, names, strict=True)]
        hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]), encoding="utf-8")
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "up")
        for name, address in zip(names, addresses, strict=True):
            namespace = f"{self.owner}-{name}"
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
            ends = ["link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", namespace]
            _ip("-n", self._switch, *ends)
            _ip("-n", self._switch, "link", "set", name, "master", "switch", "up")
            _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            self._nodes.append(Node(name, address, namespace, _hold(namespace, name, hosts)))

    def _remove(self) -> None:
        for node in self._nodes:
            self.kill(node)
            node.holder.kill()
            node.holder.communicate()
        for namespace in _namespaces():
            if namespace.startswith(f"{self.owner}-"):
                _ip("netns", "delete", namespace)
        self._nodes.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


def why_unavailable() -> str | None:
    """Why this process cannot make hosts, as far as it can be known before it is tried."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in (*_TOOLS, "tc") if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)} (iproute2, util-linux)" if missing else None


def _names(count: int) -> list[str]:
    return [f"node{chr(ord('a') + i)}" for i in range(count)]


def _hold(namespace: str, name: str, hosts: Path) -> subprocess.Popen[str]:
    """A process that keeps a host name and mounts of its own until this process closes its stdin, or is gone."""
    script = 'hostname "$0" && mount --bind "$1" /etc/hosts && echo ready && exec cat'
    holder = subprocess.Popen(
        ["ip", "netns", "exec", namespace, "unshare", "-m", "-u", "sh", "-c", script, name, str(hosts)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert holder.stdout is not None
    if holder.stdout.readline() != "ready\n":
        holder.kill()
        raise UnavailableError(f"no host of its own name and mounts: {holder.communicate()[1].strip()}")
    return holder


def _started(pid: int) -> int | None:
    """When a process began, in the kernel's ticks since the machine did; None where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


def _sweep() -> None:
    """Ends and removes the hosts of test processes that are gone."""
    for namespace in _namespaces():
        if not (found := _OWNED.match(namespace)) or _started(int(found[1])) == int(found[2]):
            continue
        try:
            _kill(lambda: _pids(namespace))  # noqa: B023 (called at once)
            _ip("netns", "delete", namespace)
        except UnavailableError:
            if namespace in _namespaces():  # else another process was quicker
                raise


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines()]


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _ip("netns", "pids", namespace).split()]


def _kill(pids: Callable[[], list[int]]) -> None:
    """SIGKILL until none is left: what is just being started is met the next time."""
    end = time.monotonic() + 30.0
    while left := pids():
        assert time.monotonic() < end, f"processes {left} cannot be ended"
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)  # a killed process is listed until the kernel is done with it


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*argv: str) -> str:
    """The stdout; UnavailableError where the kernel or the rights do not allow it."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise UnavailableError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout
