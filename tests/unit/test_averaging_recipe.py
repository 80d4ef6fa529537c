"""`averaging` in a recipe: its rules, and checkpoints of before there was such a section."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from tunesmith.checkpoint.pieces import save_pieces
from tunesmith.checkpoint.run_state import TRAINER, mathematics_hash, refuse_other_recipe
from tunesmith.errors import UserError
from tunesmith.recipe import Recipe

SOURCE = {"path": "rows.csv", "format": "classification", "columns": {"text": "text", "label": "label"}}


def recipe(averaging: dict[str, Any] | None, *, evaluates: bool = True, **sections: Any) -> Recipe:
    data: dict[str, Any] = {"train": [SOURCE]}
    if evaluates:
        data["eval"] = [SOURCE]
    values: dict[str, Any] = {
        "model": {"model_name_or_path": "builtin:minilm"},
        "data": data,
        "objective": {"type": "classification"},
        "run_name": "averaged",
        **sections,
    }
    if averaging is not None:
        values["averaging"] = averaging
    return Recipe.model_validate(values)


@pytest.mark.parametrize(
    ("averaging", "sections", "said"),
    [
        ({"type": "ema", "evaluate": "current", "final": "current"}, {}, "averaging: has no effect"),
        ({"type": "swa", "final": "current"}, {"evaluates": False}, "averaging: has no effect"),
        ({"type": "ema", "evaluate": "averaged"}, {"evaluates": False}, "averaging.evaluate: has no effect without"),
        ({"type": "ema", "evaluate": "current"}, {}, "current and final: averaged would choose the best by other"),
        ({"type": "swa", "final": "current"}, {}, "averaged and final: current would choose the best by other"),
        ({"type": "ema", "start": 100}, {"training": {"max_steps": 100}}, "averaging.start: step 100 is not before"),
        ({"type": "ema", "update_every": 9}, {"training": {"max_steps": 8}}, "averaging.update_every: 9 steps"),
        ({"type": "swa", "every": 9}, {"training": {"max_steps": 8}}, "averaging.every: 9 steps are more"),
        ({"type": "ema", "every": 2}, {}, "every"),
        ({"type": "swa", "decay": 0.9}, {}, "decay"),
        ({"type": "ema", "decay": 1.0}, {}, "decay"),
        ({"type": "swa", "start": 1.5}, {}, "start"),
        ({"type": "mean"}, {}, "ema"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(
    averaging: dict[str, Any], sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        recipe(averaging, **sections)


def test_what_is_sound_is_taken() -> None:
    assert recipe({"type": "ema"}, evaluates=False).averaging is not None
    for final in ("best", "last"):
        assert recipe({"type": "swa", "every": "epoch"}, checkpoint={"final": final}).averaging is not None
    assert recipe({"type": "ema", "evaluate": "current"}, checkpoint={"final": "last"}).averaging is not None


def checkpoint(folder: Path, made: Recipe, leave_out: tuple[str, ...]) -> Any:
    """Of a run of `made` when recipes did not have these settings yet."""
    saved = made.model_dump(mode="json")
    for key in leave_out:
        *sections, name = key.split(".")
        holder = saved
        for section in sections:
            holder = holder[section]
        del holder[name]
    save_pieces(folder / TRAINER, {"recipe": saved})
    return SimpleNamespace(path=folder, manifest=SimpleNamespace(recipe_sha256="of another text"))


def test_a_setting_that_came_since_does_not_bar_a_resume(tmp_path: Path) -> None:
    made = recipe(None)
    assert mathematics_hash(made) == mathematics_hash(recipe(None))
    refuse_other_recipe(checkpoint(tmp_path, made, ("averaging", "optim.eps", "evaluation.generate")), made)


def test_a_setting_that_came_since_and_is_used_does(tmp_path: Path) -> None:
    made = recipe({"type": "ema"}, optim={"name": "adamw", "eps": 1e-6})
    old = checkpoint(tmp_path, made, ("averaging", "optim.eps"))
    with pytest.raises(UserError, match=r"optim.eps was None and is 1e-06; averaging was None and is \{"):
        refuse_other_recipe(old, made)
