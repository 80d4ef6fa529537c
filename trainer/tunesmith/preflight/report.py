"""The report of `tunesmith check --distributed`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunesmith.preflight.agree import Preflight


def lines(preflight: Preflight, sums_checked: bool) -> Iterator[str]:
    """What was looked at, then what was found; complete on rank 0."""
    facts, findings = preflight.facts, preflight.findings
    for node in facts.get("nodes", []):
        yield f"✓ {node['name']}: {_ranks(node['ranks'])} on {node['device']}{_clock(node['clock_seconds'])}"
    if "nodes" in facts and not any(one.level == "error" for one in findings):
        yield "✓ recipe, data, model, code, versions and environment agree; the output folder is shared"
    if links := facts.get("links"):
        yield (
            f"✓ {links['links']} links: {links['slowest_megabits'] / 1e3:.2f} Gbit/s at least, "
            f"{links['median_megabits'] / 1e3:.2f} in the middle, {links['median_milliseconds']:.2g} ms"
        )
    if sums_checked:
        yield "✓ an all-reduce of known values is exact"
    yield from map(str, findings)
    levels = [one.level for one in findings]
    errors, warnings = levels.count("error"), levels.count("warning")
    yield f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count != 1)}"


def _clock(bounds: Any) -> str:
    """Where it is certainly not rank 0's, to within what was measured."""
    if bounds is None or bounds[0] <= 0.0 <= bounds[1]:
        return ""
    low, high = bounds
    return f", clock {(low + high) / 2 * 1e3:+.0f} ± {(high - low) / 2 * 1e3:.0f} ms"
