"""`section.key=value` from the command line, laid over the values of the file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.recipe.document import read
from tunesmith.recipe.faults import Fault, Path

_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True, slots=True)
class Override:
    """`text` as the user typed it, the way to the setting, and its value as YAML reads it."""

    text: str
    path: Path
    value: Any

    def fault(self, depth: int, message: str) -> Fault:
        return Fault(None, ".".join(map(str, self.path[:depth])), message, self.text)


def parse(texts: Sequence[str]) -> tuple[list[Override], list[Fault]]:
    """Split each text at its first `=`; the value is read by the recipe's own YAML parser."""
    overrides: list[Override] = []
    faults: list[Fault] = []
    for text in texts:
        key, equals, written = text.partition("=")
        key = key.strip()
        path: Path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        if not equals or not _KEY.fullmatch(key):
            faults.append(Fault(None, "", "must read section.key=value", text))
            continue
        if not written.strip():
            faults.append(Fault(None, key, "has no value; for none write null", text))
            continue
        document = read(written)
        faults += [Fault(None, key, fault.message, text) for fault in document.faults]
        if any(earlier.path == path for earlier in overrides):
            faults.append(Fault(None, key, "is given twice", text))
        elif not document.faults:
            overrides.append(Override(text, path, document.values))
    return overrides, faults


def apply(overrides: Sequence[Override], values: dict[str, Any]) -> tuple[list[Override], list[Fault]]:
    """Write the overrides into `values`, in place; those that could be, each with the way as `values` has it.
    Sections that the file leaves out are begun, an index must exist; unknown keys are left to the models."""
    done: list[Override] = []
    faults: list[Fault] = []
    for override in overrides:
        override = replace(override, path=as_written(override.path, values))
        fault = _write(override, values)
        if fault is None:
            done.append(override)
        else:
            faults.append(fault)
    return done, faults


def _write(override: Override, values: dict[str, Any]) -> Fault | None:
    holder: Any = values
    for depth, step in enumerate(override.path):
        if why := _no_place(holder, step):
            return override.fault(depth, why)
        if depth == len(override.path) - 1:
            holder[step] = override.value
        elif (step not in holder and isinstance(step, str)) or holder[step] is None:
            holder[step] = {}
        holder = holder[step]
    return None


def _no_place(holder: Any, step: str | int) -> str | None:
    """Why `step` leads nowhere below what stands at `holder`; None where it does."""
    match holder:
        case list() if not isinstance(step, int) or step >= len(holder):
            count = f"{len(holder)} {'entry' if len(holder) == 1 else 'entries'}"
            return f"is a list of {count}, counted from 0: it has no '{step}'"
        case dict() if isinstance(step, int):
            return f"has no entry {step}"
        case list() | dict():
            return None
        case _:
            return "is a single value: it has no keys"


def as_written(path: Path, values: Any) -> Path:
    """The way without the index 0 where a list of one entry is written as that entry."""
    steps: list[str | int] = []
    for step in path:
        if isinstance(values, dict):
            if step == 0:
                continue
            values = values.get(step)
        elif isinstance(values, list) and isinstance(step, int) and step < len(values):
            values = values[step]
        else:
            values = None
        steps.append(step)
    return tuple(steps)


def origin(overrides: Sequence[Override], path: Path) -> Override | None:
    """The override that gave what stands at `path`, the most particular one."""
    leading = [override for override in overrides if path[: len(override.path)] == override.path]
    return max(leading, key=lambda override: len(override.path), default=None)
