"""`tunesmith preview` marks what augmentation changes, `tunesmith check` names what it lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith.commands.check import check
from tunesmith.commands.preview import preview
from tunesmith.commands.preview_augment import changes
from tunesmith.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


def with_augment(make_recipe: MakeRecipe, *operations: dict[str, Any]) -> Recipe:
    values = make_recipe("single_label").model_dump(exclude_unset=True)
    values["data"] = {**values["data"], "augment": list(operations)}
    return Recipe.model_validate(values)


def test_changed_words_are_marked() -> None:
    found = changes("the red fox runs", "the blue fox fox")
    assert [piece for piece in found if piece[1]] == [("red→blue", True), ("runs→fox", True)]
    assert [text for text, marked in changes("a b c", "a c d") if marked] == ["−b", "+d"]


def test_training_rows_are_shown_as_they_are_augmented(make_recipe: MakeRecipe) -> None:
    drop = {"type": "token_drop", "fraction": 0.5, "probability": 1.0}
    recipe = with_augment(
        make_recipe, drop, {"type": "mixup", "alpha": 1.0}, {"type": "cutoff", "fraction": 0.5}
    )
    found = preview(recipe, Path(), "train", 3)
    for one in found.samples:
        names = [part.name.split(",")[0] for part in one.parts]
        assert names == ["label", "text", "augmented", "mixed", "cut off"]
    assert any(marked for one in found.samples for _, marked in one.parts[2].pieces)
    assert all(len(one.parts) == 2 for one in preview(recipe, Path(), "eval", 3).samples)


def test_a_check_names_what_is_missing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    table = {"type": "synonyms", "table": str(tmp_path / "none.tsv")}
    found = [one for one in check(with_augment(make_recipe, table), tmp_path) if one.topic == "augment"]
    assert [one.level for one in found] == ["error"]
    assert "none.tsv: cannot be read" in found[0].text
    model = {"type": "back_translation", "model": str(tmp_path / "nowhere")}
    found = [one for one in check(with_augment(make_recipe, model), tmp_path) if one.topic == "augment"]
    assert [one.level for one in found] == ["fine", "error"]
    assert found[1].text.startswith("data.augment.0.model: ")
