"""A thread that is in torch's store when the process ends."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from tunesmith.culprit import Beat
from tunesmith.watchdog import Watchdog

# the call comes back (its time is over) while the interpreter is being finalized, which something makes slow
IN_THE_STORE = """
import sys, threading, time
from datetime import timedelta
import torch.distributed as dist
from tunesmith.torch_threads import leave, start

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(2.5)

sys.modules["slow"] = Slow()
store = dist.TCPStore("127.0.0.1", 0, 1, True)
store.set_timeout(timedelta(seconds=0.5))
start(lambda: store.get("a key that nobody sets"))
END(5)
"""


@pytest.mark.parametrize(("end", "code"), [("sys.exit", -6), ("leave", 5)])
def test_a_process_ends_with_its_code_though_a_thread_is_in_the_store(end: str, code: int) -> None:
    """`sys.exit` beside it: where that no longer crashes, the module is not needed any more."""
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_STORE.replace("END", end)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr


def test_a_watchdog_that_is_stopped_has_told_its_last_beat() -> None:
    telling, go, told = threading.Event(), threading.Event(), threading.Event()

    def tell(beat: Beat) -> bool:
        telling.set()
        go.wait(60)
        told.set()
        return True

    watchdog = Watchdog(tell)
    assert telling.wait(60)
    threading.Timer(0.2, go.set).start()
    watchdog.stop()
    assert told.is_set()
