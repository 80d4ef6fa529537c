"""Threads that call torch's C++ (its store, its flight recorder), and the end of a process that may have one left.

Where such a call comes back while the interpreter is being finalized, CPython before 3.14 ends the thread by unwinding
its stack. pybind11's `gil_scoped_release` cannot be unwound: "terminate called without an active exception", SIGABRT,
and a run that was done has failed. So a thread is waited for, and a process that could not wait is ended at once.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import NoReturn

_started: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def start(work: Callable[[], object]) -> threading.Thread:
    """A daemon thread that does `work`, which may call torch's C++."""
    thread = threading.Thread(target=work, daemon=True)
    _started.add(thread)
    thread.start()
    return thread


def leave(code: int) -> NoReturn:
    """Ends the process with the exit code, which a thread that is still in torch's C++ does not change."""
    if any(thread.is_alive() for thread in _started):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
