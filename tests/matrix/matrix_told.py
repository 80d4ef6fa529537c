"""What an error says to a user, and what has not held."""

from __future__ import annotations

import re

from pydantic import ValidationError

from tunesmith.errors import TunesmithError


class BrokenError(Exception):
    """Something that must hold does not."""


def of_rules(error: ValidationError) -> str:
    return "; ".join(str(e.get("ctx", {}).get("error", e["msg"])) for e in error.errors()).replace("\n", "; ")


def reason(error: BaseException) -> str | None:
    """The line that a user sees, of an error that is the user's (exit code 2); None for any other."""
    if isinstance(error, TunesmithError):
        return str(error) if error.exit_code == 2 else None
    found = re.findall(r"^tunesmith\.errors\.UserError: (.+)$", str(error), re.MULTILINE)
    return found[0] if found else None


def last_line(error: BaseException) -> str:
    """Of a rank's traceback, or of the error's own message with its kind."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if len(lines) > 1 else f"{type(error).__name__}: {lines[0]}"
