"""How a run ended: what ranks, other machines and the judge said of it, and what that makes of the exit code."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import IO

from tunesmith.ending import MACHINE_UNFIT, Ending, Signalled, describe, last_step, read, record

_KILLED = (
    "the process was killed (SIGKILL), most likely by the system for lack of memory: lower "
    "training.per_device_train_batch_size or data.max_length; continue with --resume"
)


class Outcome:
    """The endings that were told, in their order. `folder` is the run's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.told: list[Ending] = []
        self._unsaid: dict[Ending, str] = {}

    @property
    def is_known(self) -> bool:
        """Whether somebody has said why the run fails."""
        return any(ending.code for ending in self.told)

    def hear(self, ending: Ending, unsaid: str) -> None:
        """A rank's last word. `unsaid`: what the user is to read if it counts, "" where the rank has said it."""
        self.told.append(ending)
        self._unsaid[ending] = unsaid

    def tell(self, ending: Ending) -> int:
        """Says and records what no rank of this machine could, unless another has told the cause; its code."""
        if all(ending.outranks(told) for told in self.told):
            print(ending.reason, file=sys.stderr, flush=True)
            try:
                record(self._folder, ending)
            except OSError as error:
                print(
                    f"{self._folder}/exit.json cannot be written: {error.strerror}",
                    file=sys.stderr,
                    flush=True,
                )
        self.told.append(ending)
        return ending.code

    def conclude(self, status: int | None, stop: int | None, log: IO[bytes], *, has_agent: bool) -> int:
        """The exit code of the run, with a line on stderr where no rank could say why. `status`: of the process that
        was started; `stop`: the signal that was passed on; `log`: what the agent wrote."""
        cause = next((e for e in self.told if not any(o.outranks(e) for o in self.told)), None)
        elsewhere = read(self._folder)  # on another machine, or by a rank whose line broke
        if status and elsewhere is not None and (cause is None or elsewhere.outranks(cause)):
            print(elsewhere.reason, file=sys.stderr, flush=True)
            cause = elsewhere
        elif cause is not None and cause.code and (cause.is_cause or elsewhere is None):
            sys.stderr.write(self._unsaid.get(cause, ""))
            sys.stderr.flush()
        explained = True
        if cause is not None and cause.code:
            code = cause.code
        elif status == 0:
            code = 0
        elif stop is not None:
            told = describe(Signalled(stop), self._folder)
            assert told is not None
            code = self._tell_of_ours(*told)
        elif status == -signal.SIGKILL:
            code = self._tell_of_ours(MACHINE_UNFIT, _KILLED)
        elif status is not None and status < 0:
            code = self._tell_of_ours(1, f"the process was ended by {signal.Signals(-status).name}")
        else:
            explained = False
            code = 1 if has_agent or status is None else status
        if not explained or os.environ.get("TUNESMITH_DEBUG") == "1":
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            sys.stderr.flush()
        return code

    def _tell_of_ours(self, code: int, reason: str) -> int:
        return self.tell(Ending(code, reason, 0, last_step(self._folder)))
