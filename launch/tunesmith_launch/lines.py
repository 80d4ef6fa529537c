"""The lines that ranks open to the supervisor (`tunesmith.__main__.Supervisor` is the other end). A rank says who
it is, is handed this process's stderr, and says at last how it ended; a line that breaks without that word is a
rank that was killed, or crashed: then Python's stacks come on it, as text."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tunesmith.culprit import SILENCE, Beat, State, Witness
from tunesmith.ending import PEER_LOST, Ending
from tunesmith.peers import state_of
from tunesmith_launch.processes import kill_group, send_signal

Event = Literal["called", "ended", "gone"]


@dataclass(slots=True, eq=False)
class Rank:
    """One rank. `ending` is its last word, `unsaid` what it left to the supervisor to say of it; `number` and `pid` are
    known once it has called. `silent`: seconds since the last beat; `lost`: its line broke, and not by our doing."""

    line: socket.socket
    number: int = -1
    pid: int = 0
    ending: Ending | None = None
    unsaid: str = ""
    unread: bytes = b""
    beat: Beat = field(default_factory=Beat)
    silent: float = 0.0
    lost: bool = False
    crash: str = ""

    def hear(self) -> Iterator[Event]:
        """What became of the rank since the last time, one event each; `gone` is the last."""
        try:
            data = self.line.recv(1 << 16)
        except ConnectionError:
            data = b""
        *messages, self.unread = (self.unread + data).split(b"\n")
        for line in messages:
            if self.crash or not line.startswith(b"{") or not line.endswith(b"}"):
                self.crash += line.decode(errors="replace") + "\n"
                continue
            message = json.loads(line)
            if "beat" in message:
                self.beat, self.silent = Beat.from_json(message["beat"]), 0.0
            elif "pid" in message:
                self.number, self.pid = message["rank"], message["pid"]
                with contextlib.suppress(OSError):  # gone already: the next read says so
                    socket.send_fds(self.line, [b"!"], [2])
                yield "called"
            else:
                self.unsaid = message.pop("unsaid")
                self.ending = Ending(**message)
                yield "ended"
        if not data:
            yield "gone"

    def witness(self, node: str | None) -> Witness:
        """The rank as it is seen from here."""
        state: State = "running"
        words = ""
        if self.lost:
            state, words = "gone", self.crash.partition("Fatal Python error: ")[2].partition("\n")[0]
        elif self.ending is not None and self.ending.code == PEER_LOST:
            state, words = "failed", self.ending.reason.removesuffix("; continue with --resume")
        elif self.silent > SILENCE and self.ending is None:
            state = state_of(self.pid)
            state = "running" if state == "gone" else state  # its line will say so
        return Witness(self.number, self.pid, node, state, self.silent, self.beat, words)

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
