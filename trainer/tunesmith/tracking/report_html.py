"""Pieces of HTML for report.html: panels, tables, and facts of any shape. Every text is escaped here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tunesmith.tracking.text import number, size


def panel(title: str, content: str) -> str:
    """A titled box around HTML."""
    return f'<h2>{escape(title)}</h2><div class="panel">{content}</div>'


def html_table(
    head: Sequence[str], rows: Sequence[Sequence[Any]], best: set[int] | None = None, bar: int | None = None
) -> str:
    """A table that a click sorts. `best`: numbers of the rows to mark; `bar`: the column that gets bars (0 to 1)."""
    left = [' class="t"' if any(isinstance(row[j], str) for row in rows) else "" for j in range(len(head))]
    top = "".join(f"<th{align}>{escape(name)}</th>" for name, align in zip(head, left, strict=True))
    lines: list[str] = []
    for i, row in enumerate(rows):
        cells = "".join(
            f'<td{left[j]} data-v="{escape("" if value is None else str(value))}">'
            f"{cell(value)}{_bar(value) if j == bar else ''}</td>"
            for j, value in enumerate(row)
        )
        lines.append(f"<tr{' class=best' if best and i in best else ''}>{cells}</tr>")
    table = f'<table class="sortable"><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _bar(value: Any) -> str:
    share = min(1.0, max(0.0, value)) if isinstance(value, int | float) else 0.0
    return f'<span class="bar"><i style="width:{share:.0%}"></i></span>'


def cell(value: Any) -> str:
    match value:
        case None:
            return "–"
        case bool() | str():
            return escape(str(value))
        case float() | int():
            return escape(score(value))
        case _:
            return fact(value)


def score(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:,}" if isinstance(value, int) else number(value)


def fact(value: Any, key: str = "") -> str:
    """Any fact, as HTML: nested containers as nested lists, bytes and seconds by the ending of their name."""
    match value:
        case dict() if value:
            items = "".join(
                f"<dt>{escape(str(name)).replace('_', ' ')}</dt><dd>{fact(item, str(name))}</dd>"
                for name, item in value.items()
            )
            return f"<dl>{items}</dl>"
        case list() if value and (len(value) > 8 or any(isinstance(item, dict) for item in value)):
            return f"<ul>{''.join(f'<li>{fact(item)}</li>' for item in value)}</ul>"
        case list() if value and any(isinstance(item, str) and len(item) > 40 for item in value):
            return f"<ul>{''.join(f'<li>{fact(item)}</li>' for item in value)}</ul>"
        case list() if value:
            return escape(", ".join(str(item) for item in value))
        case None | {} | []:
            return "–"
        case int() | float() if not isinstance(value, bool) and key.endswith("_bytes"):
            return size(value)
        case int() | float() if not isinstance(value, bool) and key.endswith("_seconds"):
            return f"{number(value)} s"
        case _:
            return cell(value)


def samples(found: Sequence[Mapping[str, Any]]) -> str:
    """Texts to read: prompts, what was generated, references."""
    parts = [
        '<div class="sample"><dl>'
        + "".join(f"<dt>{escape(key)}</dt><dd>{_text(value)}</dd>" for key, value in sample.items())
        + "</dl></div>"
        for sample in found
    ]
    return f"<h3>Samples</h3>{''.join(parts)}"


def _text(value: Any) -> str:
    texts = value if isinstance(value, list) else [value]
    return "".join(f"<pre>{escape(str(text))}</pre>" for text in texts)
