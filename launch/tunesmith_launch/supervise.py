"""Watching over the processes of a run: one signal each, the exit code of the cause, and nothing left behind.

Ranks say once a second where they are, and the processes that supervise a run's machines hold a lease of each other
(lease.py). What ends a job, and who is named, is decided in judge.py; here it is done.

Between the supervisor and several ranks stands torchrun's agent (inside `accelerate launch`). It turns every exit
code into 1 and prints a table of failures; its stderr is kept back, and shown only where no rank explains the end.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tunesmith.ending import INTERRUPTED, PEER_LOST, STOPPED, Ending
from tunesmith_launch.command import Cluster, Command
from tunesmith_launch.judge import Judge
from tunesmith_launch.lease import INTERVAL, Lease
from tunesmith_launch.lines import Rank, listen
from tunesmith_launch.outcome import Outcome
from tunesmith_launch.processes import Signals, kill_tree


@dataclass(frozen=True, slots=True)
class Grace:
    """Seconds until force is used: after a rank failed; after the verdict that one is lost, which comes up to 5 s
    past the time-out and leaves the others nothing to save; after one stopped as all have agreed, while others may
    still save; after a second Ctrl-C; and after a first force did not help."""

    failure: float = 15.0
    lost: float = 4.0
    saving: float = 120.0
    hurry: float = 2.0
    force: float = 10.0


def supervise(
    command: Command,
    folder: Path,
    cluster: Cluster | None = None,
    timeout: float = 600.0,
    grace: Grace | None = None,
) -> int:
    """Runs the command to the end of everything that it started; the exit code of the run. `folder` is the run's,
    where exit.json is left for a rank that could not; `timeout` a collective's, in seconds. Raises MachineError
    where the lease's port is not free."""
    with (
        tempfile.TemporaryDirectory(prefix="tunesmith-") as place,
        listen(Path(place)) as listener,
        tempfile.TemporaryFile() as log,
        selectors.DefaultSelector() as selector,
        Signals() as signals,
    ):
        watch = _Watch(
            command, folder, cluster or Cluster(), timeout, grace or Grace(), listener, selector, signals
        )
        watch.child = subprocess.Popen(
            command.argv,
            env=command.environment(os.environ) | {"TUNESMITH_SUPERVISOR": listener.getsockname()},
            stdin=subprocess.DEVNULL,
            stderr=log if command.has_agent else None,
            # a group of its own: the terminal's Ctrl-C reaches this process alone, which passes it on once
            process_group=0,
        )
        try:
            watch.run()
        finally:
            watch.force()
            if watch.lease is not None:
                watch.lease.close()
        return watch.outcome.conclude(watch.child.returncode, watch.stop, log, has_agent=command.has_agent)


class _Watch:
    """The state of one supervision."""

    child: subprocess.Popen[bytes]

    def __init__(
        self,
        command: Command,
        folder: Path,
        cluster: Cluster,
        timeout: float,
        grace: Grace,
        listener: socket.socket,
        selector: selectors.BaseSelector,
        signals: Signals,
    ) -> None:
        self.command, self.grace, self.outcome = command, grace, Outcome(folder)
        self.listener, self.selector, self.signals = listener, selector, signals
        self.ranks: list[Rank] = []  # whose line is open
        self.known: list[Rank] = []  # all that have called
        self.stop: int | None = None  # the signal that was passed on
        self.orphaned = False  # the child has ended before its ranks
        self.forces = 0
        self.deadline: float | None = None  # of the next force
        several = cluster.num_machines > 1
        self.lease = Lease(cluster, timeout, selector, self._told) if several else None
        self.judge = Judge(timeout, self.lease, first=cluster.machine_rank == 0)
        self.ticked = time.monotonic()
        selector.register(listener, selectors.EVENT_READ, self._accept)
        selector.register(signals.wakeup, selectors.EVENT_READ, self._heed)

    def run(self) -> None:
        """Until the child and all its ranks have ended, and it is known why."""
        while True:
            ended = self.child.poll() is not None
            while ended and self._turn(0):  # what ranks said before that
                pass
            if (ended and not self.ranks and not self._open_question()) or self.forces > 1:
                return
            if ended and self.ranks and not self.orphaned:
                self._orphans()
            self._turn(self._patience())
            now = time.monotonic()
            if self.command.has_agent and now >= self.ticked + INTERVAL:
                self._tick(now)
            if self._is_left() and self.deadline is not None and now >= self.deadline:
                self.force()

    def _is_left(self) -> bool:
        return bool(self.ranks) or self.child.poll() is None

    def _patience(self) -> float | None:
        """Seconds until something is to be done that nobody asks for."""
        due = [self.deadline] if self.deadline is not None and self._is_left() else []
        if self.command.has_agent:
            due.append(self.ticked + INTERVAL)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _turn(self, timeout: float | None) -> bool:
        ready = self.selector.select(timeout)
        for key, _ in ready:
            key.data()
        return bool(ready)

    def _expect_end(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.deadline = end if self.deadline is None else min(end, self.deadline)

    # the ranks

    def _accept(self) -> None:
        rank = Rank(self.listener.accept()[0])
        self.ranks.append(rank)
        self.selector.register(rank.line, selectors.EVENT_READ, lambda: self._hear(rank))

    def _hear(self, rank: Rank) -> None:
        for event in rank.hear():
            match event:
                case "called":
                    self.known.append(rank)
                    if self.stop is not None and self.command.has_agent:
                        rank.send(self.stop)  # it came late
                case "ended":
                    assert rank.ending is not None
                    self._ended(rank.ending, rank.unsaid)
                case "gone":
                    self.selector.unregister(rank.line)
                    rank.line.close()
                    self.ranks.remove(rank)
                    sys.stderr.write(rank.crash)
                    if rank.ending is None and rank.pid and self.command.has_agent:
                        self._expect_end(self.grace.failure)
                        rank.lost = self.stop is None and not self.forces

    def _ended(self, ending: Ending, unsaid: str) -> None:
        if ending.code:
            agreed = ending.code in {STOPPED, INTERRUPTED}
            self._expect_end(self.grace.saving if agreed else self.grace.failure)
        if ending.code == PEER_LOST and self.command.has_agent and self.stop is None:
            return  # which one, and why, the judge says
        self.outcome.hear(ending, unsaid)
        if ending.is_cause and self.lease is not None:
            self.lease.tell(ending)

    # the watchdog

    def _tick(self, now: float) -> None:
        passed, self.ticked = now - self.ticked, now
        for rank in self.ranks:
            # time that this process itself did not live through (suspended, swapped out) is not held against a rank
            rank.silent += min(passed, 1.5 * INTERVAL)
        node = None if self.lease is None else self.lease.node
        witnesses = [rank.witness(node) for rank in self.known]
        if self.lease is not None:
            self.lease.tick(witnesses, passed)
        if not self._answered() and (verdict := self.judge.review(witnesses, now)) is not None:
            ending = Ending(PEER_LOST, verdict.reason, verdict.rank, verdict.step)
            if self.lease is not None:
                self.lease.tell(ending)
            self._told(ending)

    def _answered(self) -> bool:
        """Whether it is known why the job ends."""
        return self.stop is not None or self.outcome.is_known

    def _open_question(self) -> bool:
        lost = any(rank.witness(None).state in {"gone", "failed"} for rank in self.known)
        return self.command.has_agent and lost and not self._answered()

    def _told(self, ending: Ending) -> None:
        """How the job ends, as the judge or a rank of another machine says it."""
        if ending not in self.outcome.told:
            self.outcome.tell(ending)
            self._expect_end(self.grace.lost if ending.code == PEER_LOST else self.grace.failure)

    # signals

    def _heed(self) -> None:
        for number in self.signals.read():
            if number == signal.SIGCHLD:
                continue  # only there to end the waiting
            if self.stop is None:
                self.stop = signal.SIGTERM if number == signal.SIGHUP else number
                for rank in self.ranks:
                    rank.send(self.stop)
                if not any(rank.pid for rank in self.ranks) and self.child.poll() is None:
                    self.child.terminate()  # it is still starting, or waits for other machines
            elif number == signal.SIGINT:
                if self.deadline is not None and self.deadline <= time.monotonic() + self.grace.hurry:
                    self.force()  # the third
                for rank in self.ranks:
                    rank.send(signal.SIGINT)
                self._expect_end(self.grace.hurry)

    def _orphans(self) -> None:
        self.orphaned = True
        for rank in self.ranks:
            if self.command.has_agent and rank.ending is None:
                rank.send(signal.SIGTERM)
            else:  # what holds the line is a helper that the rank left behind
                rank.kill()
        self._expect_end(self.grace.failure)

    def force(self) -> None:
        """SIGKILL for whatever is left."""
        left = self.child.poll() is None
        for rank in self.ranks:
            left = True
            rank.kill()
        if self.child.returncode is None:
            kill_tree(self.child.pid)
            try:
                self.child.wait(self.grace.force)
            except subprocess.TimeoutExpired:
                print(f"process {self.child.pid} cannot be ended", file=sys.stderr, flush=True)
        self.forces += left
        self.deadline = time.monotonic() + self.grace.force
        if left and sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # a progress bar had hidden the cursor
