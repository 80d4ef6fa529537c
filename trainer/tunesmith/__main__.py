"""One rank of a run: `python -m tunesmith RECIPE [section.key=value …] [--resume | --overwrite | --restart]`, started
alone, by `tunesmith train`, `accelerate launch` or `torchrun`."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from tunesmith.culprit import Beat, Verdict
from tunesmith.ending import (
    INTERRUPTED,
    PEER_LOST,
    STOPPED,
    Ending,
    Signalled,
    describe,
    holds_a_run,
    last_step,
    read,
    record,
    run_folder,
    wait_for_word,
)
from tunesmith.errors import MachineError
from tunesmith.peers import Peers
from tunesmith.recipe.load import Loaded, load_recipe
from tunesmith.torch_threads import leave
from tunesmith.watchdog import Watchdog, keep_records

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tunesmith", description=__doc__)
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint")
    how.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    how.add_argument(
        "--restart", action="store_true", help="continue from a whole checkpoint, or begin again"
    )
    return parser.parse_intermixed_args(arguments)


class Supervisor:
    """The rank's line to the `tunesmith train` that started it. It gives this process the terminal's stderr (the
    launcher between them writes its own elsewhere), says once a second where the rank is and at last how it ended,
    and its break means that nobody watches any more: the rank then stops as if by SIGTERM. A crash leaves Python's
    stacks on it."""

    def __init__(self, path: str, rank: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._lock = threading.Lock()
        self._unsent = b""
        try:
            self._socket.connect(path)
            self._say({"rank": rank, "pid": os.getpid()})
            _, (stderr,), _, _ = socket.recv_fds(self._socket, 1, 1)
        except (OSError, ValueError):
            raise MachineError("the `tunesmith train` that started this process is gone") from None
        os.dup2(stderr, 2)
        os.close(stderr)
        faulthandler.enable(self._socket)
        threading.Thread(target=self._watch, daemon=True).start()
        self.watchdog = Watchdog(self.beat) if several() else None

    def _watch(self) -> None:
        if not self._socket.recv(1):
            os.kill(os.getpid(), signal.SIGTERM)

    def _say(self, message: object, *, wait: bool = True) -> None:
        """`wait=False`: nothing more is said while the other end has not read what was said before."""
        with self._lock:
            data = self._unsent + json.dumps(message).encode() + b"\n"
            if wait:
                self._unsent = b""
                self._socket.sendall(data)
                return
            with contextlib.suppress(BlockingIOError):
                if self._unsent:
                    self._unsent = self._unsent[self._socket.send(self._unsent, socket.MSG_DONTWAIT) :]
                if not self._unsent:
                    data = json.dumps(message).encode() + b"\n"
                    self._unsent = data[self._socket.send(data, socket.MSG_DONTWAIT) :]

    def beat(self, beat: Beat) -> bool:
        try:
            self._say({"beat": beat.to_json()}, wait=False)
        except OSError:
            return False
        return True

    def report(self, ending: Ending, unsaid: str = "") -> None:
        """`unsaid`: what the user is to read if this is how the run ended, "" where a rank has said it."""
        with contextlib.suppress(OSError):  # gone: exit.json and the exit code are left
            if ending.code == PEER_LOST and self.watchdog is not None:
                self._say({"beat": self.watchdog.last_words().to_json()})
            self._say(asdict(ending) | {"unsaid": unsaid})

    def stop(self) -> None:
        """No beat follows."""
        if self.watchdog is not None:
            self.watchdog.stop()


def several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one rank; the exit code. A fault of ours is raised on."""
    given = parse(arguments)
    rank = int(os.environ.get("RANK", "0"))
    faulthandler.enable()
    keep_records()
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` has SIGHUP ignored
            signal.signal(number, _raise_signalled)
    word = _Word(rank)
    try:
        if path := os.environ.pop("TUNESMITH_SUPERVISOR", None):
            word.supervisor = Supervisor(path, rank)
        elif several():
            word.peers = Peers(rank, int(os.environ["WORLD_SIZE"]), word.end)
        loaded = load_recipe(given.recipe, given.overrides)
        if word.peers is not None:
            word.peers.timeout = loaded.recipe.parallel.timeout
        word.folder = own_folder(loaded, given, clean=rank == 0 and word.supervisor is None)
        train(loaded, given)
    except BaseException as error:
        # the ranks' launcher sends SIGTERM to all as soon as one has ended: what is left here takes a moment
        _on_signals(_nothing)
        told = describe(error, word.folder)
        code, reason = told or (1, "".join(traceback.format_exception_only(error)).strip())
        debug = os.environ.get("TUNESMITH_DEBUG") == "1"
        trace = "".join(traceback.format_exception(error)) if debug or told is None else ""
        speak, reason = word.leave(code, reason, trace if told is None else f"{reason}\n{trace}")
        _on_signals(signal.SIG_DFL)
        if speak and told is None:
            raise
        if speak:
            sys.stderr.write(f"{reason}\n{trace}")
            sys.stderr.flush()
        return code
    if rank != 0:
        word.folder = None
    word.leave(0, "done", "")
    return 0


def _on_signals(handler: signal.Handlers | Callable[[int, FrameType | None], None]) -> None:
    for number in _SIGNALS:
        signal.signal(number, handler)


def _nothing(number: int, frame: FrameType | None) -> None:
    """In place of SIG_IGN: Python complains of a signal that arrives while that is set."""


def _raise_signalled(number: int, frame: FrameType | None) -> None:
    """Until the loop takes the signals over, and after it: nothing can be saved."""
    _on_signals(_nothing)
    raise Signalled(number)


def own_folder(loaded: Loaded, given: argparse.Namespace, *, clean: bool) -> Path | None:
    """The run's folder, cleaned of how an earlier run ended; None where it holds a run that is to be left alone."""
    folder = run_folder(loaded.recipe, loaded.base)
    if holds_a_run(folder) and not (given.resume or given.overwrite or given.restart):
        return None
    if clean:
        (folder / "exit.json").unlink(missing_ok=True)
    return folder


def train(loaded: Loaded, given: argparse.Namespace) -> None:
    from tunesmith.run import Resume, run

    run(loaded.recipe, loaded.base, Resume(given.resume, given.overwrite, given.restart))


@dataclass(slots=True)
class _Word:
    """Who is to know how this rank ends. `folder` is the run's, None where none is this rank's to write to."""

    rank: int
    folder: Path | None = None
    supervisor: Supervisor | None = None
    peers: Peers | None = None

    def leave(self, code: int, reason: str, words: str) -> tuple[bool, str]:
        """Leaves word of the ending. Whether it is for this rank to tell the user, and the reason. `words`: what a
        user would then read."""
        if self.peers is not None and code != PEER_LOST:
            self.peers.watchdog.stop()
        step = None if self.folder is None else last_step(self.folder)
        ending = Ending(code, reason, self.rank, step)
        if code == PEER_LOST and self.supervisor is not None:
            self.supervisor.report(ending)  # now: it asks everybody, and says whose fault it was
        # without a folder all ranks fail alike, or were stopped for another's failure: the supervisor knows which
        speak = self.supervisor is None and os.environ.get("LOCAL_RANK", "0") == "0"
        unsaid = words if self.folder is None else ""
        if self.folder is not None:
            self._wait(code, self.folder)
            if code == PEER_LOST and self.peers is not None and read(self.folder) is None:
                verdict = self.peers.judge(reason.removesuffix("; continue with --resume"))
                if verdict is not None:
                    ending = Ending(code, verdict.reason, verdict.rank, verdict.step)
            speak = self._record(self.folder, ending)
        if self.supervisor is not None and code != PEER_LOST:
            self.supervisor.report(ending, unsaid)
        if self.supervisor is not None:
            self.supervisor.stop()
        return speak, ending.reason

    def _wait(self, code: int, folder: Path) -> None:
        """Who knows more speaks first: the peer that was lost, or who judges; rank 0, where all have agreed to stop,
        which may have a tracker to close, and would be killed if another ended long before it."""
        if code == PEER_LOST:
            wait_for_word(folder, 3.0 if self.supervisor is None else 10.0)
        elif self.rank != 0 and code in {STOPPED, INTERRUPTED}:
            one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
            wait_for_word(folder, 60.0 if one_machine else 3.0)

    def _record(self, folder: Path, ending: Ending) -> bool:
        try:
            before = record(folder, ending)
        except OSError as error:
            print(f"{folder}/exit.json cannot be written: {error.strerror}", file=sys.stderr, flush=True)
            return True
        return before is None or (ending.is_cause and before.reason != ending.reason)

    def end(self, verdict: Verdict) -> None:
        """Ends this process from another thread, by what was found of the job."""
        ending = Ending(PEER_LOST, verdict.reason, verdict.rank, verdict.step)
        if self.folder is not None and self._record(self.folder, ending):
            print(verdict.reason, file=sys.stderr, flush=True)
        os._exit(PEER_LOST)


if __name__ == "__main__":
    leave(main())
