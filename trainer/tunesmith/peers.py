"""The watchdog of ranks that nobody supervises (`accelerate launch -m tunesmith`, `torchrun -m tunesmith`).

Each rank leaves its beats in the store of the process group. One that has waited for its peers past the time-out, or
lost one, reads everybody's twice, judges, leaves the verdict in the store, and ends; the others find it there within
two seconds and end too, wherever they are stuck. A rank that is stopped cannot: ranks of its machine end it. What
they cannot reach are the agents (torchrun's on another machine waits for them as long as it likes)."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

from tunesmith import torch_threads
from tunesmith.culprit import SILENCE, Beat, State, Verdict, Witness, judge
from tunesmith.watchdog import INTERVAL, Watchdog

_VERDICT = "tunesmith/verdict"
_MARGIN = 3.0  # seconds past the time-out: gloo and NCCL are given the chance to say it themselves
_BETWEEN = 2.5 * INTERVAL  # of the two readings: a rank whose beats are the same in both is silent
# for every rank to find a verdict: the store may go with the process that gave it
_NOTICE = 2.5 * INTERVAL
_ANSWER = timedelta(seconds=5)


class _Store(Protocol):
    """What is used of torch's."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def compare_set(self, key: str, expected: str, value: str) -> bytes: ...


class Peers:
    """The watch of one rank. `end` is called, in the watch's thread, with a verdict of another rank or of its own:
    it leaves word and does not return."""

    def __init__(self, rank: int, world_size: int, end: Callable[[Verdict], None]) -> None:
        self.rank, self.world_size, self._end = rank, world_size, end
        self.timeout = 600.0  # seconds; the recipe's, once it is read
        self._groups: Any = None  # the process group's store, which outlives it
        self._store: _Store | None = None
        self._beats = 0
        self.watchdog = Watchdog(self._tell)

    def _tell(self, beat: Beat) -> bool:
        self._groups = self._groups or _groups_store()
        store = self._store = self._store or _connect(self._groups)
        if store is None:
            return True
        try:
            found = self._leave(store, beat)
        except RuntimeError:
            return False  # the store is gone with its process: gloo and NCCL say so themselves
        if found is None and beat.waits is not None and beat.seconds > self.timeout + _MARGIN:
            found = self.judge("")
        if found is not None:
            self._end(found)
        return True

    def _leave(self, store: _Store, beat: Beat) -> Verdict | None:
        self._beats += 1
        values = {
            "number": self._beats,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "beat": beat.to_json(),
        }
        store.set(f"tunesmith/beat/{self.rank}", json.dumps(values))
        return _verdict(store.get(_VERDICT)) if store.check([_VERDICT]) else None

    def judge(self, reason: str) -> Verdict | None:
        """The verdict on the job: the first rank's that comes to one. `reason` is what this rank knows itself. None
        where the store does not answer in time."""
        found: list[Verdict] = []
        thread = torch_threads.start(lambda: found.extend(self._judge(reason)))
        thread.join(2 * _BETWEEN + _NOTICE + 1.0)
        return found[0] if found else None

    def _judge(self, reason: str) -> list[Verdict]:
        beat = self.watchdog.last_words()
        # a connection of its own: the other may hang in an answer that does not come
        store = _connect(self._groups)
        if store is None:
            return []
        try:
            first = self._read(store)
            time.sleep(_BETWEEN)
            second = self._read(store)
            found = judge(self._witnesses(first, second, beat, reason), [], self.timeout)
            given = _verdict(store.compare_set(_VERDICT, "", _text(found)))
        except RuntimeError:
            return []
        for witness in self._witnesses(first, second, beat, reason):
            if witness.state == "stopped" and witness.rank == given.rank and _is_sibling(witness.pid):
                with suppress(ProcessLookupError):
                    os.kill(witness.pid, signal.SIGKILL)
        time.sleep(_NOTICE)
        return [given]

    def _read(self, store: _Store) -> dict[int, dict[str, Any]]:
        keys = {rank: f"tunesmith/beat/{rank}" for rank in range(self.world_size) if rank != self.rank}
        return {rank: json.loads(store.get(key)) for rank, key in keys.items() if store.check([key])}

    def _witnesses(
        self, first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]], own: Beat, reason: str
    ) -> list[Witness]:
        here, several = (
            socket.gethostname(),
            len({v["host"] for v in second.values()} | {socket.gethostname()}) > 1,
        )
        state: State = "failed" if reason else "running"
        found = [Witness(self.rank, os.getpid(), here if several else None, state, 0.0, own, reason)]
        for rank, values in sorted(second.items()):
            silent = values["number"] == first.get(rank, values)["number"]
            state = state_of(values["pid"]) if silent and values["host"] == here else "running"
            node = values["host"] if several else None
            silence = SILENCE + _BETWEEN if silent else 0.0
            found.append(Witness(rank, values["pid"], node, state, silence, Beat.from_json(values["beat"])))
        return found


def _groups_store() -> Any:
    """The store of the process group, once there is one."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not getattr(distributed, "is_initialized", lambda: False)():
        return None
    return distributed.distributed_c10d._get_default_store()


def _connect(groups: Any) -> _Store | None:
    """A connection of our own to the store."""
    if groups is None:
        return None
    try:
        store = groups.clone()
        store.set_timeout(_ANSWER)
    except RuntimeError:
        return None
    return store


def _text(verdict: Verdict) -> str:
    return json.dumps([verdict.reason, verdict.rank, verdict.step])


def _verdict(text: bytes) -> Verdict:
    reason, rank, step = json.loads(text)
    return Verdict(reason, rank, step)


def state_of(pid: int) -> State:
    """Of a process of this machine."""
    import psutil

    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "gone"
    if status == psutil.STATUS_ZOMBIE:
        return "gone"
    return "stopped" if status == psutil.STATUS_STOPPED else "running"


def _is_sibling(pid: int) -> bool:
    """Whether the same agent has started it: a process of another run may have got a pid that was heard of."""
    import psutil

    try:
        return psutil.Process(pid).ppid() == os.getppid()
    except psutil.NoSuchProcess:
        return False
