"""What a check finds: one line each, with the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from tunesmith.errors import MachineError, TunesmithError

T = TypeVar("T")

_MARKS = {"fine": "✓", "warning": "!", "error": "✗"}


@dataclass(frozen=True, slots=True)
class Finding:
    """`exit_code` is 0 unless `level` is "error": 2 where the user's input is wrong, 3 where the machine is not
    fit."""

    level: Literal["fine", "warning", "error"]
    topic: str
    text: str
    fix: str = ""
    exit_code: int = 0

    def __str__(self) -> str:
        fix = f" → {self.fix}" if self.fix else ""
        return f"{_MARKS[self.level]} {self.topic}: {self.text}{fix}"


def fine(topic: str, text: str) -> Finding:
    return Finding("fine", topic, text)


def warning(topic: str, text: str, fix: str) -> Finding:
    return Finding("warning", topic, text, fix)


def error(topic: str, text: str, fix: str, exit_code: int = 2) -> Finding:
    return Finding("error", topic, text, fix, exit_code)


def from_exception(topic: str, caught: TunesmithError) -> Finding:
    """An error of ours, whose message holds its fix."""
    return Finding("error", topic, str(caught), "", 3 if isinstance(caught, MachineError) else 2)


def attempt(topic: str, build: Callable[[], T]) -> T | Finding:
    """What `build` returns, or the TunesmithError that it raises as a finding."""
    try:
        return build()
    except TunesmithError as caught:
        return from_exception(topic, caught)


def exit_code(findings: Iterable[Finding]) -> int:
    """0 without errors; 2 before 3, for what the user can mend comes first."""
    return min((finding.exit_code for finding in findings if finding.exit_code), default=0)
