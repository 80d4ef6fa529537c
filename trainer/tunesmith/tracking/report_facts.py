"""What report.html says of the facts of a run: memory by group, and what ran."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from tunesmith.tracking.report_html import fact, html_table, panel
from tunesmith.tracking.text import MEMORY_COLUMNS, memory_cells, peak_line, size


def memory(environment: Mapping[str, Any], training: Sequence[Mapping[str, Any]]) -> str:
    """What each group of parameters takes on a device, and the predicted peak beside the measured one."""
    facts = environment.get("facts", {})
    rows = [memory_cells(row) for row in facts.get("groups") or []]
    parts = [html_table(MEMORY_COLUMNS, rows)] if rows else []
    if peak := facts.get("predicted_peak"):
        measured = max((row["peak_memory_bytes"] or 0 for row in training), default=0)
        beside = f"; measured {size(measured)}" if measured else ""
        parts.append(f"<p>{escape(peak_line(peak) + beside)}</p>")
    return panel("Memory of each group", "".join(parts)) if parts else ""


def what_ran(environment: Mapping[str, Any]) -> str:
    """All other facts, as lists."""
    facts = {
        name: value
        for name, value in environment.get("facts", {}).items()
        if name not in {"groups", "predicted_peak"}
    }
    parts = [
        f"<h3>{escape(title)}</h3>{fact(found)}" for title, found in _groups(facts, environment) if found
    ]
    panels = "".join(f'<div class="panel">{part}</div>' for part in parts)
    return f'<h2>What ran</h2><div class="grid2">{panels}</div>' if panels else ""


def _groups(facts: dict[str, Any], environment: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "Notes", facts.pop("notes", None)
    for split, about in facts.pop("data", {}).items():
        yield f"Rows of {split}", about
    yield "Run", facts
    yield "Machine and versions", {key: value for key, value in environment.items() if key != "facts"}
