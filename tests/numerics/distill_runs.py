"""Teachers for the tests of distillation: finished runs of the cases."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from objective_cases import ADAMW, CASES, WHOLE, recipe
from tunesmith.run import Resume, run


def trained(workshop: Path, case: str, seed: int = 11) -> str:
    """The folder of a finished run of a case, trained away from where the students begin."""
    name = f"teacher-{case}-{seed}"
    if not (workshop / "runs" / name / "final").is_dir():
        faster = {**ADAMW, "optim": {**ADAMW["optim"], "learning_rate": 0.01, "max_grad_norm": None}}
        made = recipe(workshop, CASES[case], faster, WHOLE, 6, training={"seed": seed})
        run(made.model_copy(update={"run_name": name}), workshop, Resume())
    return str(workshop / "runs" / name)


def distil(teacher: str, **settings: Any) -> dict[str, Any]:
    return {"teacher_model_name_or_path": teacher, "temperature": 2.0, **settings}


def some(names: Iterable[str], *fast: str) -> list[Any]:
    """All of the names, those that are not among the fast marked slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]
