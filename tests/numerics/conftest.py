"""Fixtures of the numerical proofs: the tiny models and data, and runs that are made once and compared often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from objective_cases import CASES, Layout, Result, Run, read_result, recipe
from rank_pool import Pools
from tiny_data import build_data
from tiny_models import build_models
from tunesmith.run import Resume, run


@pytest.fixture(scope="session", autouse=True)
def _one_thread(one_thread: None) -> None:
    """All of this folder."""


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `models/` and `data/`; the runs and the cache go there too."""
    root = tmp_path_factory.mktemp("numerics")
    build_models(root / "models", build_data(root / "data"))
    return root


@pytest.fixture(scope="session")
def workshop_eval(workshop: Path) -> dict[str, dict[str, Any]]:
    """For each case a data section with the training rows as `eval`."""
    return {
        name: {"eval": [{"path": str(workshop / "data" / f"{case.file}.jsonl"), "format": case.format}]}
        for name, case in CASES.items()
    }


@pytest.fixture(scope="session")
def train(workshop: Path, pools: Pools) -> Run:
    """train(case, optimizer, layout, steps, **sections) → Result, of the real run; equal calls train once."""
    results: dict[str, Result] = {}

    def once(case: str, optimizer: dict[str, Any], layout: Layout, steps: int, **sections: Any) -> Result:
        made = recipe(workshop, CASES[case], optimizer, layout, steps, **sections)
        key = f"{layout}:{made.model_dump_json()}"
        if key not in results:
            named = made.model_copy(update={"run_name": f"{case}-{len(results)}"})
            if made.parallel.strategy in {"auto", "single"} and layout.world_size == 1:
                run(named, workshop, Resume())
            else:
                pools[layout.world_size].run(named, workshop)
            results[key] = read_result(workshop / "runs" / named.run_name)
        return results[key]

    return once
