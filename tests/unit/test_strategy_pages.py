"""Every page of a strategy says what it is, when it is for something, what it costs and what was measured, and has a
recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/strategies").glob("*.md"))


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
