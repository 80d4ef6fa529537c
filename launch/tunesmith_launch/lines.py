"""The lines that ranks open to the supervisor (`tunesmith.__main__.Supervisor` is the other end). A rank says who
it is, is handed this process's stderr, and says at last how it ended; a line that breaks without that word is a
rank that was killed."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.ending import Ending
from tunesmith_launch.processes import kill_group, send_signal

Event = Literal["called", "ended", "gone"]


@dataclass(slots=True, eq=False)
class Rank:
    """One rank. `ending` is its last word; `number` and `pid` are known once it has called."""

    line: socket.socket
    number: int = -1
    pid: int = 0
    ending: Ending | None = None
    unread: bytes = b""

    def hear(self) -> Iterator[Event]:
        """What became of the rank since the last time, one event each; `gone` is the last."""
        try:
            data = self.line.recv(1 << 16)
        except ConnectionError:
            data = b""
        *messages, self.unread = (self.unread + data).split(b"\n")
        for message in map(json.loads, messages):
            if "pid" in message:
                self.number, self.pid = message["rank"], message["pid"]
                with contextlib.suppress(OSError):  # gone already: the next read says so
                    socket.send_fds(self.line, [b"!"], [2])
                yield "called"
            else:
                self.ending = Ending(**message)
                yield "ended"
        if not data:
            yield "gone"

    def send(self, number: int) -> None:
        if self.pid:
            send_signal(self.pid, number)

    def kill(self) -> None:
        """SIGKILL for the rank and the helpers in its group."""
        if self.pid:
            kill_group(self.pid)


def listen(folder: Path) -> socket.socket:
    """A listening socket `line` in the folder."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "line"))
    listener.listen(128)
    return listener
