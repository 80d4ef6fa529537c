"""The cells of the strategies' matrix: a strategy on every objective in one process, and on every engine."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from tests.matrix.strategy_settings import STRATEGIES, Fragment, Sections, Strategy
from tests.numerics.objective_cases import CASES, SGD, Case, Layout, recipe
from tunesmith.recipe import Recipe
from tunesmith.recipe.translate import translate

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

SPLIT, SPREAD = Layout(2), Layout(4, world_size=RANKS)
"""The windows of 16 rows in 8 micro-batches; on both ranks, two each."""


class RefusedError(Exception):
    """The recipe's own rules refuse the cell; what a user is told."""


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
    def alone(self) -> Cell:
        """The same objective in one process."""
        return Cell(self.strategy, self.settings.on) if self.column in ENGINES else self

    @property
    def case(self) -> Case:
        return OBJECTIVES[self.alone.column]

    @property
    def run_name(self) -> str:
        return re.sub(r"\W+", "-", str(self))

    def __str__(self) -> str:
        return f"{self.strategy} | {self.column}"


CELLS = [Cell(strategy, column) for column in (*OBJECTIVES, *ENGINES) for strategy in STRATEGIES]


def _of(sections: Sections, workshop: Path, case: Case) -> Fragment:
    return sections(workshop, case) if callable(sections) else sections


def plain_recipe(cell: Cell, workshop: Path) -> Recipe:
    """The cell's run in one process without the strategy; equal ones have one name."""
    beside = _of(cell.settings.beside, workshop, cell.case)
    name = hashlib.sha256(json.dumps(beside, sort_keys=True).encode()).hexdigest()[:8]
    sections: Fragment = {
        "checkpoint": {"save_steps": MIDDLE, "save_total_limit": None, "final": "last"},
        "output_dir": str(workshop / "runs"),
        "run_name": f"plain-{cell.case.name}-{name}",
    }
    return recipe(workshop, cell.case, SGD, Layout(16), STEPS, **sections | beside)


def cell_recipe(cell: Cell, workshop: Path, layout: Layout | None = None) -> Recipe:
    """Six steps of SGD, saved in the middle; on an engine or, with the layout of SPLIT, in small micro-batches. Raises
    RefusedError."""
    values = plain_recipe(cell, workshop).model_dump(exclude_unset=True)
    if cell.engine != "single":
        layout, values["parallel"] = SPREAD, {"strategy": cell.engine}
    if layout is not None:
        values["training"]["per_device_train_batch_size"] = layout.micro_batch
    values["run_name"] = cell.run_name + ("-split" if layout is SPLIT else "")
    for name, section in _of(cell.settings.sections, workshop, cell.case).items():
        if section is None:
            del values[name]
        else:
            values[name] = {**values.get(name, {}), **section}
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        told = [f"{problem.key}: {problem.message}" for problem in translate(error.errors(), values)]
        rules = [str(one["ctx"]["error"]) for one in error.errors() if not one["loc"] and "ctx" in one]
        raise RefusedError("; ".join("\n".join([*told, *rules]).splitlines())) from None
