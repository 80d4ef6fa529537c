"""Signals that come in and go out."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import dataclass, field
from types import FrameType, TracebackType


@dataclass(slots=True)
class Signals:
    """A context in which signals end nothing but make `wakeup` readable. SIGHUP stays ignored where it was (nohup)."""

    wakeup: socket.socket = field(init=False)
    _writer: socket.socket = field(init=False)
    _before: dict[int, object] = field(init=False)

    def __enter__(self) -> Signals:
        self.wakeup, self._writer = socket.socketpair()
        for end in (self.wakeup, self._writer):
            end.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, _nothing)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self.wakeup.close()
        self._writer.close()

    def read(self) -> bytes:
        """The numbers of the signals that came, in their order."""
        return self.wakeup.recv(4096)


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler only so that the number is written to the wake-up socket."""


def send_signal(pid: int, number: int) -> None:
    """To the process, if it is still there."""
    assert pid > 0
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_group(pid: int) -> None:
    """SIGKILL for the group of which `pid` is the leader, or was: its members may have outlived it."""
    assert pid > 0
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; on macOS: all of it are zombies
        os.killpg(pid, signal.SIGKILL)


def kill_tree(pid: int) -> None:
    """SIGKILL for the process, its group, and its descendants in groups of their own."""
    import psutil

    send_signal(pid, signal.SIGSTOP)  # it starts no more of them meanwhile
    try:
        descendants = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        descendants = []
    for process in descendants:
        send_signal(process.pid, signal.SIGKILL)
    kill_group(pid)
