"""The rank's part of the watchdog: a thread that says once a second which step and which collective the rank is in.

The collectives come from torch's flight recorder, a ring of the last ones that gloo and NCCL keep by themselves. To
read 128 entries takes about 1 ms and needs no collective; the thread needs the interpreter for it, which both leave
free while they wait. A rank whose thread is silent is stopped, or in code that lets no Python run.

Under `tunesmith train` the beats go to the process that started the rank, which judges (tunesmith_launch.judge).
Without it (`accelerate launch -m tunesmith`, `torchrun -m tunesmith`) ranks leave them in the store of the process
group and judge themselves (tunesmith.peers).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from tunesmith import torch_threads
from tunesmith.culprit import STEP, Beat, Collective

INTERVAL = 1.0  # seconds between beats
_ENTRIES = "128"
_LAST = 5.0  # seconds for a beat that is being told when the watchdog is stopped
_TELLING = 2.0  # seconds in a collective after which its history is sent along

_steps: deque[tuple[int, int]] = deque(maxlen=64)  # (optimizer steps done, time in ns)


def stepped(step: int) -> None:
    """An optimizer step is done."""
    _steps.append((step, time.time_ns()))


def keep_records() -> None:
    """Asks torch for its flight recorder; before torch is imported."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _ENTRIES)


class Recorder:
    """Reads the flight recorder. Not for several threads at once."""

    def __init__(self) -> None:
        self._reached: dict[str, int] = {}
        self._oldest: tuple[Collective, float] | None = None  # that is not done, and since when

    def beat(self, *, last: bool = False) -> Beat:
        """Where the rank is. `last`: what failed counts as waited for, and the history is told."""
        step = _steps[-1][0] if _steps else None
        entries = _entries()
        for entry in entries:
            c = _collective(entry)
            self._reached[c.group] = max(c.sequence, self._reached.get(c.group, 0))
        open_ = [entry for entry in entries if not entry["retired"]]
        if last:
            open_ = open_ or entries[-1:]
        if not open_:
            return Beat(step, None, 0.0, dict(self._reached), _recent(entries) if last else ())
        oldest = _collective(open_[0])
        if self._oldest is None or self._oldest[0] != oldest:
            self._oldest = (oldest, time.monotonic())
        seconds = time.monotonic() - self._oldest[1]
        recent = _recent(entries) if last or seconds > _TELLING else ()
        return Beat(step, oldest, seconds, dict(self._reached), recent)


def _entries() -> list[dict[str, Any]]:
    """The recorded collectives, oldest first; empty before torch is there."""
    c10d = sys.modules.get("torch._C._distributed_c10d")
    entries: list[dict[str, Any]] = []
    for name in (
        "_dump_fr_trace_json",
        "_dump_nccl_trace_json",
    ):  # each of the two backends has one of its own
        if (dump := getattr(c10d, name, None)) is not None:
            entries += json.loads(dump()).get("entries", [])
    return [entry for entry in entries if not entry["is_p2p"]]


def _collective(entry: dict[str, Any]) -> Collective:
    name = str(entry["profiling_name"]).partition(":")[2] or str(entry["profiling_name"])
    sizes: list[list[int]] = entry.get("input_sizes") or []
    count = 0
    for size in sizes:
        elements = 1
        for extent in size:
            elements *= extent
        count += elements
    types = entry.get("input_dtypes") or []
    of = f" of {count} {types[0]}" if count and types else ""
    return Collective(str(entry["process_group"][0]), int(entry["collective_seq_id"]), name + of)


def _recent(entries: list[dict[str, Any]]) -> tuple[Collective, ...]:
    """The last 64 of the group of all ranks, and where steps ended between them."""
    of_all = [entry for entry in entries if entry["process_group"][1] == "default_pg"][-64:]
    if not of_all:
        return ()
    first = of_all[0]["time_created_ns"]
    timed = [(int(entry["time_created_ns"]), _collective(entry)) for entry in of_all]
    timed += [(when, Collective("", 0, STEP)) for _, when in tuple(_steps) if when > first]
    return tuple(c for _, c in sorted(timed, key=lambda pair: pair[0]))


class Watchdog:
    """The thread. `tell` is called with a beat each second; where it returns False it is not called again."""

    def __init__(self, tell: Callable[[Beat], bool]) -> None:
        self._tell = tell
        self._recorder = Recorder()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._failed = False
        self._thread = torch_threads.start(self._run)

    def last_words(self) -> Beat:
        """Where the rank was when it failed, from any thread; so it will be in all further beats."""
        with self._lock:
            self._failed = True
            return self._recorder.beat(last=True)

    def stop(self) -> None:
        """No beat follows. Waits for the one that is being told."""
        self._stopped.set()
        self._thread.join(_LAST)

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL):
            with self._lock:
                beat = self._recorder.beat(last=self._failed)
            if not self._tell(beat):
                return
