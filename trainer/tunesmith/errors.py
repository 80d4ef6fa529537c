"""What can stop a run, each with the exit code that `tunesmith train` returns for it (docs/run-folder.md)."""

from __future__ import annotations

from dataclasses import dataclass


class TunesmithError(Exception):
    """Base of every error whose message is written for the user: one line per fault, no traceback."""

    exit_code = 1


class UserError(TunesmithError, ValueError):
    """The user's input (recipe, file, command line) is wrong. Exit code 2."""

    exit_code = 2


class MachineError(TunesmithError, RuntimeError):
    """The machine is not fit: memory, disk, network, versions. Exit code 3."""

    exit_code = 3


class MissingExtra(MachineError, ImportError):
    """The recipe asks for an optional package that is not installed. Exit code 3."""

    def __init__(self, package: str, extra: str, needed_for: str) -> None:
        super().__init__(f"{needed_for} needs {package}: pip install 'tunesmith[{extra}]'")


class TrainingStopped(TunesmithError, RuntimeError):
    """Training stopped itself (non-finite loss, …). Exit code 4."""

    exit_code = 4


class Interrupted(TunesmithError):
    """A signal ended the run after a checkpoint was saved. Exit code 5, resumable."""

    exit_code = 5


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row came from: a file (or hub id, or builtin source) and its line (1-based; the row number
    where the file has no lines)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class DataError(UserError):
    """A data file is not what it claims. The message is `FILE:LINE: COLUMN: what is wrong`, the parts that
    apply. Exit code 2."""

    def __init__(self, what: str, place: Place | None = None, column: str | None = None) -> None:
        where = "".join(f"{part}: " for part in (place, column) if part is not None)
        super().__init__(f"{where}{what}")
        self.place = place
        self.column = column
