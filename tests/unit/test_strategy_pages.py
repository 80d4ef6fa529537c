"""Every page of a strategy says what it is, when it is for something, what it costs and what was measured, and has a
recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/strategies").glob("*.md"))
COSTS = (ROOT / "docs/strategies-cost.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"^\| \[([^]]+)\]\(strategies/([\w-]+\.md)\) \| (×[^|]+) \| ([^|]+) \| [^|]+ \|$", re.MULTILINE
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_complete_and_its_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for part in ("**What.**", "**When.**", "**Cost.**", "**Measured.**"):
        assert part in text, part
    assert re.search(r"configs/\w+(\.yaml|`)", text), "no recipe"
    named = re.findall(r"`?configs/(\w+)\b(?:\.yaml)?", text)
    assert [name for name in named if not (ROOT / f"configs/{name}.yaml").is_file()] == []
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_the_costs_of_the_table_and_no_others(page: Path) -> None:
    """bench/strategy_cost.py writes both."""
    (cost,) = re.findall(r"^\*\*Cost\.\*\* (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert "(../strategies-cost.md)" in cost
    measured = [
        f"{name} {time}, {memory}" for name, of, time, memory in ROW.findall(COSTS) if of == page.name
    ]
    assert [told for told in measured if told not in cost] == []
    assert len(re.findall(r"× [\d.]+ \(", cost)) == len(measured)
    if not measured:
        assert re.search(rf"^- \[[^]]+\]\(strategies/{page.name}\): ", COSTS, re.MULTILINE), "not in the list"
        assert cost.startswith("Nothing in a step")


def test_the_table_of_costs_is_of_the_pages_that_there_are() -> None:
    linked = re.findall(r"\]\(strategies/([^)]+)\)", COSTS)
    assert set(linked) == {page.name for page in PAGES}
    assert (
        len(re.findall(r"^\| .*×", COSTS, re.MULTILINE)) == len(ROW.findall(COSTS)) + 1
    )  # and the plain step
