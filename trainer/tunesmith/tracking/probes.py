"""What a run gained and lost of what its model could do before, for people."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from tunesmith.tracking.report_html import html_table, panel


def probe_rows(probes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, object]]:
    """One row per probe and metric: before, after and what became of it."""
    rows: list[dict[str, object]] = []
    for name, probe in probes.items():
        for metric, before in probe["before"].items():
            after = probe["after"].get(metric)
            change = after - before if before is not None and after is not None else None
            rows.append({"probe": name, "metric": metric, "before": before, "after": after, "change": change})
    return rows


def probe_section(probes: Mapping[str, Mapping[str, Any]]) -> str:
    """The same as a part of the report; empty where there is no probe."""
    if not probes:
        return ""
    rows = [list(row.values()) for row in probe_rows(probes)]
    about = "; ".join(
        f"{name}: {probe['rows']:,} {probe['split']} rows of {probe['run']}" for name, probe in probes.items()
    )
    table = html_table(["probe", "metric", "before", "after", "change"], rows)
    return panel("Remembered", f'{table}<p class="note">{escape(about)}</p>')
