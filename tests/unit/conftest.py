"""Fixtures of the commands' tests: tiny runs of every objective, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.numerics.objective_cases import ADAMW, CASES, Layout, recipe
from tests.numerics.tiny_data import build_data
from tests.numerics.tiny_models import build_models
from tunesmith.recipe import Recipe
from tunesmith.run import Resume, run

MakeRecipe = Callable[..., Recipe]
Trained = Callable[[str], Path]

GENERATING = {"sft", "causal_lm", "seq2seq_t5"}


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `models/` and `data/`; the runs and the cache go there too."""
    root = tmp_path_factory.mktemp("commands")
    build_models(root / "models", build_data(root / "data"))
    return root


@pytest.fixture(scope="session")
def make_recipe(workshop: Path) -> MakeRecipe:
    """make_recipe(case, **sections): two steps, with a third of the rows for eval and test."""

    def make(case: str, **sections: Any) -> Recipe:
        generate = {"generate": {"max_new_tokens": 6, "limit": 5}} if case in GENERATING else {}
        values: dict[str, Any] = {
            "data": {"split": {"eval": 0.2, "test": 0.2}, "group_by_length": True},
            "evaluation": {"eval_steps": 1, "per_device_eval_batch_size": 4, **generate},
            "checkpoint": {"save_steps": 1, "final": "last"},
            "run_name": case,
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
        return recipe(workshop, CASES[case], ADAMW, Layout(8), 2, **values)

    return make


@pytest.fixture(scope="session")
def trained(workshop: Path, make_recipe: MakeRecipe) -> Trained:
    """trained(case) → the folder of its run; equal calls train once."""
    done: dict[str, Path] = {}

    def once(case: str) -> Path:
        if case not in done:
            made = make_recipe(case)
            run(made, workshop, Resume())
            done[case] = workshop / "runs" / made.run_name
        return done[case]

    return once
