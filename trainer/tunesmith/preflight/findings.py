"""What the preflight finds: a line each, which names the node, the fact and the fix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.errors import MachineError, TunesmithError, UserError

Level = Literal["error", "warning"]
_MARKS: dict[Level, str] = {"error": "✗", "warning": "!"}


@dataclass(frozen=True, slots=True)
class Finding:
    """`exit_code` is that of an error: 2 where recipe or data disagree, 3 where a machine is not fit. `node` is one
    node, or both ends of a link."""

    level: Level
    node: str
    what: str
    fix: str
    exit_code: int = 3

    def __str__(self) -> str:
        return f"{_MARKS[self.level]} {self.node}: {self.what} → {self.fix}"

    def to_json(self) -> list[Any]:
        return [self.level, self.node, self.what, self.fix, self.exit_code]


def from_json(values: Sequence[Any]) -> Finding:
    return Finding(*values)


def error(node: str, what: str, fix: str, exit_code: int = 3) -> Finding:
    return Finding("error", node, what, fix, exit_code)


def warning(node: str, what: str, fix: str) -> Finding:
    return Finding("warning", node, what, fix, 0)


def exit_code(findings: Sequence[Finding]) -> int:
    """0 without errors; 2 before 3: what the user wrote is mended first."""
    return min((one.exit_code for one in findings if one.level == "error"), default=0)


def as_error(findings: Sequence[Finding]) -> TunesmithError | None:
    """One error with every finding of that level, a line each; None without any."""
    errors = [one for one in findings if one.level == "error"]
    if not errors:
        return None
    text = "\n".join(map(str, errors))
    return UserError(text) if exit_code(errors) == 2 else MachineError(text)
