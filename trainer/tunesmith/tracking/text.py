"""Numbers and facts as text, and what a text must not give away."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_NAMES_SECRET = r"(?:token(?!iz)|key|secret|passw)"
_SECRET = re.compile(_NAMES_SECRET, re.IGNORECASE)
_ASSIGNED = re.compile(rf"([\w.-]*{_NAMES_SECRET}[\w.-]*=)[^\s&]+", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
REDACTED = "[redacted]"


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
            return f"{count:.3g} {unit}"
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
    for name, values in parts.items():
        if shown := [str(value) for value in values if value]:
            yield f"  {name:8}{', '.join(shown)}"
    for note in facts.get("notes", []):
        yield f"  note    {note}"


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
