"""What a part of the check writes down as it goes: a line of JSON per fact, so that a part that is stopped keeps
what it has."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

_LOST = ("CUDA error", "Triton Error [CUDA]")


class OutOfTime(Exception):  # noqa: N818
    """The part's time is up."""


class DeviceLost(Exception):  # noqa: N818
    """An error after which nothing more can run on the device in this process."""


class Record:
    """The lines of one part. seconds: how long it may take."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.started, self.seconds = path, time.monotonic(), seconds

    def remaining(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def row(
        self,
        case: str,
        name: str,
        value: float,
        unit: str,
        limit: str | None = None,
        least: float | None = None,
    ) -> None:
        """value: where it was measured several times, the median. limit: "<= 1.1" or ">= 1.5"."""
        row = {"case": case, "name": name, "value": value, "least": least, "unit": unit, "limit": limit}
        self._write("row", row)

    def note(self, text: str) -> None:
        self._write("note", text)

    def fail(self, text: str) -> None:
        self._write("failure", text)

    def fact(self, facts: Mapping[str, Any]) -> None:
        """What the results file says of the device and the versions."""
        self._write("fact", facts)

    def _write(self, kind: str, content: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({kind: content}, ensure_ascii=False) + "\n")

    @contextlib.contextmanager
    def attempt(self, case: str, needs: float = 0.0) -> Generator[None]:
        """Whatever is raised within becomes a failure of this case, and the part goes on with the next. needs: seconds;
        where less is left the case is not begun, by OutOfTime."""
        if self.remaining() < needs:
            raise OutOfTime(f"{case}: not run, {self.remaining():.0f} s are left of {self.seconds:.0f}")
        try:
            yield
        except (OutOfTime, DeviceLost):
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:500]
            self.fail(f"{case}: {type(error).__name__}: {text}")
            if any(sign in text for sign in _LOST) and "out of memory" not in text:
                raise DeviceLost(f"stopped after {case}: the device is lost to this process") from error


def read(path: Path) -> dict[str, list[Any]]:
    """The rows, failures, notes and facts of a part."""
    found: dict[str, list[Any]] = {"rows": [], "failures": [], "notes": [], "facts": []}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # cut off in the middle
                continue
            for kind, content in entry.items():
                found[f"{kind}s"].append(content)
    return found
