"""Numbers and facts as text, and what a text must not give away."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_NAMES_SECRET = r"(?:token(?!iz)|key|secret|passw)"
_SECRET = re.compile(_NAMES_SECRET, re.IGNORECASE)
_ASSIGNED = re.compile(rf"([\w.-]*{_NAMES_SECRET}[\w.-]*=)[^\s&]+", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
REDACTED = "[redacted]"

MOST_GROUPS = 8  # of the memory table that have a line of their own
MEMORY_COLUMNS = (
    "group",
    "parameters",
    "trained",
    "dtype",
    "learning rate",
    "decay",
    "weights",
    "gradients",
    "optimizer",
)
_WORDS = {0, 2, 3}  # columns of it that are words
_AMOUNTS = ("parameters", "weights", "gradients", "optimizer")


def redacted(value: Any, key: str = "") -> Any:
    """A copy of nested plain containers without secrets: texts under a key that names one (`hub_token`, `api_key`;
    not `tokenizer`), what follows `name=` with such a name, and the user part of a URL."""
    match value:
        case dict():
            return {name: redacted(item, str(name)) for name, item in value.items()}
        case list() | tuple():
            return [redacted(item, key) for item in value]
        case str() if value and _SECRET.search(key):
            return REDACTED
        case str():
            return _ASSIGNED.sub(rf"\1{REDACTED}", _IN_URL.sub(REDACTED, value))
        case _:
            return value


def number(value: float) -> str:
    """Four significant digits; very small and very large numbers with an exponent."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{value:.2e}"


def duration(seconds: float) -> str:
    """`1:23`, `1:02:03`, `2d 03:04:05`; `0.4s` below a second; `?` for what is no duration."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if 0 < seconds < 1:
        return f"{seconds:.1f}s"
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def size(count: float) -> str:
    """Bytes as `3.21 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}" if abs(count) < 999.5 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def startup_lines(
    run_name: str, total_steps: int, facts: Mapping[str, Any], resumed: int | None
) -> Iterator[str]:
    """The start-up report: what is trained, on what, from which rows, and what to know about it."""
    yield f"{run_name}: {total_steps:,} steps" + (
        "" if resumed is None else f", resumed from step {resumed:,}"
    )
    total, trained = facts.get("total_parameters"), facts.get("trainable_parameters")
    some = f"{total:,} parameters" if isinstance(total, int) else None
    if isinstance(trained, int) and trained != total:
        some = f"{some}, {trained:,} of them trained"
    rows = facts.get("global_batch_size")
    parts: dict[str, list[object]] = {
        "model": [facts.get("model_class"), some, facts.get("attn_implementation")],
        "engine": [
            facts.get("engine"),
            f"world size {facts['world_size']}" if "world_size" in facts else None,
            facts.get("device"),
            facts.get("precision"),
            facts.get("precision_why"),
        ],
        "why": [facts.get("engine_why") if facts.get("world_size", 1) > 1 else None],
        "batch": [
            f"{rows:,} rows a step" if isinstance(rows, int) else None,
            f"{facts['steps_per_epoch']:,} steps an epoch" if "steps_per_epoch" in facts else None,
        ],
    }
    parts["kernels"] = [_kernel(op, how) for op, how in facts.get("kernels", {}).items()]
    for split, about in facts.get("data", {}).items():
        parts[split] = _rows(about)
    parts["features"] = _features(facts)
    parts["teacher"] = _teachers(facts.get("distill", {}))
    for name, values in parts.items():
        if shown := [str(value) for value in values if value]:
            yield f"  {name:8}{', '.join(shown)}"
    for place, line in enumerate(memory_lines(facts)):
        yield f"  {'' if place else 'memory':8}{line}"
    for note in facts.get("notes", []):
        yield f"  note    {note}"


def _teachers(facts: Mapping[str, Any]) -> list[object]:
    named = [
        f"{one['name']} ({one['class']}, {one['parameters']:,} parameters, {one['dtype']}, {one['placement']})"
        for one in facts.get("teachers", [])
    ]
    kept = [
        f"{one['name']}, its {one['top_k']} likeliest classes from disk" for one in facts.get("offline", [])
    ]
    return [*named, *kept, *facts.get("logits", {}).values()]


def _features(facts: Mapping[str, Any]) -> list[object]:
    if (rows := facts.get("cached_features_rows")) is None:
        return []
    computed = facts.get("cached_features_computed_rows", 0)
    return [
        f"of {sum(rows.values()):,} rows on disk",
        size(facts["cached_features_bytes"]),
        f"{computed:,} computed now" if computed else "none computed now",
        f"largest difference {facts['cached_features_difference']:.1e} of the largest feature",
    ]


def _kernel(op: str, how: str) -> str:
    path, _, why = how.partition(": ")
    return f"{op} {path} ({why})" if why else f"{op} {path}"


def _rows(about: Mapping[str, Any]) -> list[object]:
    shown: list[object] = []
    for key, value in about.items():
        if isinstance(value, int) and value and not isinstance(value, bool):
            shown.append(f"{value:,} {key.replace('_', ' ')}")
        elif isinstance(value, Mapping) and key in {"dropped", "changed"}:
            shown += [f"{key}: {reason} {count:,}" for reason, count in value.items()]
    return shown


def memory_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """`facts["groups"]` are rows of `tunesmith.planning.groups.memory_table`, `facts["predicted_peak"]` that of
    `tunesmith.planning.predict`. Nothing, where there are none."""
    if rows := facts.get("groups"):
        cells = [MEMORY_COLUMNS, *(memory_cells(row) for row in shortened(rows, MOST_GROUPS))]
        widths = [max(len(line[column]) for line in cells) for column in range(len(MEMORY_COLUMNS))]
        for line in cells:
            yield "  ".join(_padded(cell, widths[i], i) for i, cell in enumerate(line)).rstrip()
    if peak := facts.get("predicted_peak"):
        yield peak_line(peak)


def _padded(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column in _WORDS else cell.rjust(width)


def shortened(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """The first groups and their sum; the groups beyond `most` as one."""
    *groups, total = rows
    if len(groups) <= most:
        return list(rows)
    kept, rest = groups[: most - 1], groups[most - 1 :]
    others: dict[str, Any] = {name: sum(row[name] for row in rest) for name in _AMOUNTS}
    return [*kept, {"tag": f"{len(rest)} more"} | others, total]


def memory_cells(row: Mapping[str, Any]) -> list[str]:
    """One row as texts, in the order of `MEMORY_COLUMNS`."""
    never = row.get("trained_from") is None
    rate, decay = (None if never else row.get(name) for name in ("learning_rate", "weight_decay"))
    return [
        str(row["tag"]),
        f"{row['parameters']:,}",
        _trained(row),
        str(row.get("dtype") or ""),
        "" if rate is None else f"{rate:.3g}",
        "" if decay is None else f"{decay:.3g}",
        *(size(row[name]) if row[name] else "–" for name in _AMOUNTS[1:]),
    ]


def _trained(row: Mapping[str, Any]) -> str:
    if "trained_from" not in row:  # a sum
        return ""
    match row["trained_from"]:
        case None:
            return "no"
        case 0:
            return "yes"
        case step:
            return f"from step {step:,}"


def peak_line(peak: Mapping[str, Any]) -> str:
    """`predicted peak 1.2 GiB at the head and loss: …`"""
    if peak.get("bytes") is None:
        return f"no peak predicted: {peak.get('why')}"
    before = peak.get("process_bytes", 0)
    parts = [f"{name} {size(amount)}" for name, amount in peak.get("parts", {}).items() if amount]
    parts += [f"the process beside these {size(before)}"] if before else []
    return f"predicted peak {size(peak['bytes'])}, {peak['moment']}: {', '.join(parts)}"
