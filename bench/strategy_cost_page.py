"""Where the figures of bench/strategy_cost.py stand: docs/strategies-cost.md, and the cost line of each page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
NOTHING = {
    "adapter-arithmetic": "the adapters are read and one is written; a singular value decomposition of each module "
    "for `…_svd`",
    "back-translation": "once, a generation of (1 + variants) × the training texts, which is kept in the cache",
    "calibration": "one evaluation after the training, the same as for thresholds",
    "deep-ensembles": "as many trainings, predictions and models on disk as members",
    "ensembles": "the members' predictions, one after the other",
    "layer-init": "the teacher is read once more at the start",
    "probes": "two evaluations of each, before the first step and after the last, and the memory of one more model",
    "snapshot-ensembles": "a checkpoint on disk for each cycle, and as many predictions",
    "soups": "the members are read and one model is written; `greedy`: an evaluation of each soup that is tried",
    "thresholds": "one evaluation after the training",
}
"""Strategies that do nothing in a step, by their pages, and what they cost instead."""

_BEGINS, _ENDS = "Step time and memory beside the plain step's", "([table](../strategies-cost.md))"


@dataclass(frozen=True)
class Cost:
    name: str
    page: str
    ratio: float
    low: float
    high: float
    more_bytes: int
    plain_bytes: int  # the plain one's peak

    @property
    def link(self) -> str:
        return f"[{self.name}](strategies/{self.page}.md)" if self.page else self.name

    @property
    def time(self) -> str:
        return f"× {self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"

    @property
    def memory(self) -> str:
        return f"{self.more_bytes / 2**20:+.0f} MiB"


def write(found: list[Cost], steps: int) -> None:
    """Into the table, and into the pages whose cost line has a sentence for it."""
    (DOCS / "strategies-cost.md").write_text(table(found, steps), encoding="utf-8")
    by_page = sorted(
        (cost for cost in found if cost.page), key=lambda cost: cost.page
    )  # stable: in the table's order
    for name, costs in groupby(by_page, key=lambda cost: cost.page):
        page = DOCS / f"strategies/{name}.md"
        told = "; ".join(f"{cost.name} {cost.time}, {cost.memory}" for cost in costs)
        sentence = f"{_BEGINS}: {told} {_ENDS}"
        pattern = f"{re.escape(_BEGINS)}.*?{re.escape(_ENDS)}"
        text, times = re.subn(pattern, lambda _, new=sentence: new, page.read_text(encoding="utf-8"))
        assert times == 1, f"{page}: {times} sentences begin with {_BEGINS}"
        page.write_text(text, encoding="utf-8")


def table(found: list[Cost], steps: int) -> str:
    lines = [
        "# What strategies cost a step",
        "",
        "Written by `bench/strategy_cost.py` from the recipes in `bench/strategy_recipes.py`: 16 rows of 64 tokens a "
        "step (24 rows in three forwards for several tasks, at most 128 tokens for on-policy and other tokens), fp32, "
        "AdamW, one thread of a CPU of a busy machine. Time: CPU time, the making of the rows in it, in turns with the "
        f"plain step of the same recipe, the median of at least {steps} ratios (and from where to where they go). "
        "Memory: the peak of a process that takes two steps, beside the plain one's. A ratio between 0.95 and 1.05 or "
        "a difference below some 30 MiB says nothing. MiniLM-L6 classifies; what remembers goes on from a run of it; "
        "what is distilled has 3 of its layers. Language models are Llamas of width 256 with 2 layers, their teachers "
        "have 4; 30,522 tokens, or 2,048 for on-policy, and for other tokens where the teacher has 1,024. What a "
        "strategy does once, before the first step or after the last, is not in it: its page says so.",
        "",
        "| strategy | step time | memory | plain peak |",
        "|---|---|---|---|",
        *(
            f"| {cost.link} | {cost.time} | {cost.memory} | {cost.plain_bytes / 2**20:,.0f} MiB |"
            for cost in found
        ),
        "",
        "## Nothing in a step",
        "",
        *(f"- [{_title(page)}](strategies/{page}.md): {instead}." for page, instead in NOTHING.items()),
    ]
    return "\n".join(lines) + "\n"


def _title(page: str) -> str:
    return page.replace("-", " ")
