"""The cells of the strategies' matrix: a strategy on every objective in one process, and on every engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.numerics.objective_cases import CASES, SGD, Case, Layout, recipe
from tunesmith.recipe import Recipe

STEPS, MIDDLE = 6, 3
RANKS = 2

OBJECTIVES = {
    "causal_lm": CASES["causal_lm"],
    "sft": CASES["sft"],
    "masked_lm": CASES["masked_lm"],
    "span_corruption": CASES["span_corruption"],
    "seq2seq": CASES["seq2seq_t5"],
    "single label": CASES["single_label"],
    "multi label": CASES["multi_label"],
    "regression": CASES["regression"],
    "tokens": CASES["token_classification"],
    "question answering": CASES["question_answering"],
}
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")

Fragment = dict[str, Any]


@dataclass(frozen=True)
class Strategy:
    """`sections`: of a recipe, over those of the case; a function takes the workshop and the case. `on`: the objective
    on which the engines are tried. `random`: draws by micro-batch (dropout), so that another split of the window
    gives other numbers. `eval`: needs evaluation rows."""

    sections: Fragment | Callable[[Path, Case], Fragment]
    on: str = "single label"
    random: bool = False
    eval: bool = False

    def of(self, workshop: Path, case: Case) -> Fragment:
        return self.sections(workshop, case) if callable(self.sections) else self.sections


@dataclass(frozen=True)
class Cell:
    """One strategy on one objective of OBJECTIVES in one process, or on one engine."""

    strategy: str
    column: str

    @property
    def engine(self) -> str:
        return self.column if self.column in ENGINES else "single"

    @property
    def settings(self) -> Strategy:
        return STRATEGIES[self.strategy]

    @property
    def case(self) -> Case:
        return OBJECTIVES[self.settings.on if self.column in ENGINES else self.column]

    def __str__(self) -> str:
        return f"{self.strategy} | {self.column}"


def old_rows(workshop: Path, case: Case) -> list[Fragment]:
    path = workshop / "data" / f"{case.file}.jsonl"
    return [{"path": str(path), "format": case.format, "limit": 8}]


def _remember(**parts: Any) -> Fragment:
    return {"remember": parts}


def _ewc(workshop: Path, case: Case) -> Fragment:
    return _remember(ewc={"weight": 0.1, "rows": 8, "labels": "data", "data": old_rows(workshop, case)})


STRATEGIES: dict[str, Strategy] = {
    "averaging: ema": Strategy({"averaging": {"type": "ema", "decay": 0.5}}),
    "averaging: swa": Strategy({"averaging": {"type": "swa", "start": 2}}),
    "remember: l2_sp": Strategy(_remember(l2_sp={"weight": 0.5})),
    "remember: anchor": Strategy(_remember(anchor={"weight": 0.5})),
    "remember: ewc": Strategy(
        lambda workshop, case: _remember(
            ewc={"weight": 0.1, "rows": 8, "labels": "data", "data": old_rows(workshop, case)}
        )
    ),
    "remember: wise_ft": Strategy(_remember(wise_ft={"alpha": 0.5})),
}

CELLS = [Cell(strategy, column) for column in (*OBJECTIVES, *ENGINES) for strategy in STRATEGIES]


def cell_recipe(
    cell: Cell,
    workshop: Path,
    run_name: str,
    *,
    plain: bool = False,
    accumulated: bool = False,
    alone: bool = False,
) -> Recipe:
    """Six steps of SGD, saved in the middle. `plain`: without the strategy; `accumulated`: in small micro-batches;
    `alone`: an engine's cell in one process. Raises pydantic's ValidationError where the recipe's own rules refuse
    the cell."""
    case, strategy = cell.case, cell.settings
    spread = cell.engine != "single" and not alone
    layout = Layout(4, world_size=RANKS) if spread else Layout(2 if accumulated else 16)
    sections: Fragment = {
        "checkpoint": {"save_steps": MIDDLE, "save_total_limit": None, "final": "last"},
        "output_dir": str(workshop / "runs"),
        "run_name": run_name,
    }
    if spread:
        sections["parallel"] = {"strategy": cell.engine}
    if strategy.random:
        sections["model"] = {"dropout": 0.1}
    if strategy.eval:
        sections["data"] = {"eval": old_rows(workshop, case)}
    if not plain:
        for name, section in strategy.of(workshop, case).items():
            merged = isinstance(section, dict) and name in sections
            sections[name] = {**sections[name], **section} if merged else section
    return recipe(workshop, case, SGD, layout, STEPS, **sections)
