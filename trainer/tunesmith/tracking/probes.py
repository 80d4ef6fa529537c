"""What a run gained and lost of what its model could do before, for people."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any


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
    lines = [
        "<tr>"
        + "".join(
            f"<td>{escape(str(cell))}</td>"
            if isinstance(cell, str)
            else f'<td class="num">{_number(cell)}</td>'
            for cell in row.values()
        )
        + "</tr>"
        for row in probe_rows(probes)
    ]
    about = "; ".join(
        f"{escape(name)}: {probe['rows']:,} {escape(probe['split'])} rows of {escape(probe['run'])}"
        for name, probe in probes.items()
    )
    head = "".join(f"<th>{name}</th>" for name in ("probe", "metric", "before", "after", "change"))
    return (
        f'<section class="panel"><h2>Remembered</h2><p>{about}</p>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></section>"
    )


def _number(value: object) -> str:
    return "–" if value is None else f"{value:.4f}"
