"""What strategies add to the plan: copies of the trained weights, teachers, second views of the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.test_planning import SINGLE, found, planned
from tunesmith.planning.beside import Beside, beside, per_weight
from tunesmith.recipe import Recipe
from tunesmith.recipe.parallel import FSDP2

RULES = {
    "averaging": {"type": "ema"},
    "regularization": {"sharpness": {"type": "sam"}, "r_drop": {}},
    "remember": {"l2_sp": {}, "ewc": {"data": [{"path": "a", "format": "classification"}]}},
}


def recipe(**settings: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "builtin:minilm", "dropout": 0.1},
            "data": {"train": [{"path": "a", "format": "classification"}], "max_length": 32},
            "objective": {"type": "classification"},
            "run_name": "beside",
            **settings,
        }
    )


@pytest.mark.parametrize(
    ("names", "expected"), [((), 0), (("averaging",), 4), (("regularization",), 4), (tuple(RULES), 20)]
)
def test_copies_of_the_trained_weights(names: tuple[str, ...], expected: int) -> None:
    """fp32: an average, what SAM steps away from, L2-SP's start, EWC's start and importance."""
    assert per_weight(recipe(**{name: RULES[name] for name in names})) == expected


def test_copies_are_sharded_as_the_optimizers_state_is() -> None:
    about = found()
    work = about.workload
    about.workload = replace(work, beside=Beside(per_weight=4.0))
    kept = found()
    for parallel, world in ((SINGLE, 1), (FSDP2(strategy="fsdp2"), 2)):
        more = planned(about, parallel, world).optimizer - planned(kept, parallel, world).optimizer
        assert more == pytest.approx(4 * work.trainable / world, rel=0.02)


def test_two_views_of_four_rows_are_eight_rows() -> None:
    about, plain = found(rows=8), found(rows=8)
    about.workload = replace(about.workload, beside=Beside(views=2))
    ours, theirs = planned(about, rows=4), planned(plain, rows=8)
    assert (ours.activations, ours.logits) == (theirs.activations, theirs.logits)


@pytest.mark.parametrize(
    ("teacher", "per_element"),
    [({}, 4), ({"dtype": "bf16"}, 2), ({"quantization": "nf4"}, 4.5 / 8)],
)
def test_a_teacher_is_counted_from_its_files(
    tmp_path: Path, teacher: dict[str, Any], per_element: float
) -> None:
    (tmp_path / "final").mkdir()
    save_file(
        {"a": torch.zeros(30, 10), "b": torch.zeros(7, dtype=torch.bfloat16)},
        tmp_path / "final" / "m.safetensors",
    )
    settings = {"teachers": [{"model_name_or_path": str(tmp_path), **teacher}]}
    asked = recipe(distill=settings)
    assert beside(asked, Path()).whole == 307 * per_element
    # the tables of tokens keep their 4 bytes beside quantised layers, and are on every process
    (tmp_path / "final" / "config.json").write_text('{"vocab_size": 30}')
    assert "needs beside its weights is not counted" in beside(asked, Path()).notes[0]
    table = 300 * (4 if "quantization" in teacher else per_element)
    assert beside(asked, Path()).whole == 7 * per_element + table
    shared = (
        recipe(
            distill={"teachers": [{**settings["teachers"][0], "placement": "sharded"}]},
            parallel={"strategy": "fsdp2"},
        )
        if "quantization" not in teacher
        else None
    )
    if shared is not None:
        found = beside(shared, Path())
        assert (found.dealt, found.whole) == (7 * per_element, table)
    assert Beside(dealt=100.0).on_one(4) == 25.0


def test_a_teacher_that_is_not_here_is_a_note() -> None:
    about = beside(recipe(distill={"teacher_model_name_or_path": "some/teacher"}), Path())
    assert about.whole == 0.0
    assert "the teacher's weights are not counted" in about.notes[0]
