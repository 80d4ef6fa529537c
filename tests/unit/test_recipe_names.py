"""Other tools' names: none is accepted, each is an error that names ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.recipe import Recipe
from tunesmith.recipe.advice import generic
from tunesmith.recipe.load import (
    RecipeError,
    load_recipe,
)
from tunesmith.recipe.names import KEYS, NOTES
from tunesmith.recipe.shape import choices, settings
from tunesmith.recipe.values import ROADMAP, VALUES

SMALL = """\
model: {model_name_or_path: m}
data: {train: {path: a.csv, format: classification}}
objective: {type: classification}
"""


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    return load_recipe(write(folder, text), overrides).recipe


def lines_of(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


@pytest.mark.parametrize("name", [*KEYS, *NOTES])
def test_another_tools_key_gets_advice_where_it_is_meant(name: str, tmp_path: Path) -> None:
    section, _, leaf = name.rpartition(".")
    text = {
        "": f"{SMALL}{leaf}: 1\n",
        "model": SMALL.replace("{model_name", f"{{{leaf}: 1, model_name"),
        "data": SMALL.replace("{train", f"{{{leaf}: 1, train"),
        "data.train": SMALL.replace("{path", f"{{{leaf}: 1, path"),
        "objective": SMALL.replace("{type", f"{{{leaf}: 1, type"),
    }.get(section, f"{SMALL}{section}: {{{leaf}: 1}}\n")
    ours = KEYS.get(name)
    [line] = lines_of(tmp_path, text)
    if ours is None:
        assert line.endswith(f"{leaf}: {NOTES[name]}")
    else:
        assert line.endswith(
            (f"here it is {ours}", f"not available in this version; its place will be {ours}")
        )


def test_the_tables_of_names_name_settings_of_ours() -> None:
    known = settings(Recipe)
    leaves = {key.rpartition(".")[2] for key in known}
    for name, ours in KEYS.items():
        assert ours.partition(": ")[0] in known, ours
        assert "." in name or name not in leaves, f"{name} is a name of ours"
    assert not (set(NOTES) & set(KEYS))
    assert not (set(NOTES) & leaves)
    for key, table in VALUES.items():
        assert generic(tuple(key.split("."))) == key
        allowed = {word for info, _ in known[key] for word in choices(info)} | ROADMAP.get(key, set())
        assert set(table.values()) <= allowed, key
        assert not set(table) & allowed, key


@pytest.mark.parametrize("key", VALUES)
def test_another_tools_value_is_an_error_that_names_ours(key: str, tmp_path: Path) -> None:
    section, _, leaf = key.rpartition(".")
    for value, ours in VALUES[key].items():
        text = {
            "model": SMALL.replace("{model_name", f"{{{leaf}: '{value}', model_name"),
            "data": SMALL.replace("{train", f"{{{leaf}: '{value}', train"),
            "data.train": SMALL.replace("format: classification", f"format: '{value}'"),
            "objective": SMALL.replace("type: classification", f"type: '{value}'"),
            "tracking.wandb": f"{SMALL}tracking: {{wandb: {{{leaf}: '{value}'}}}}\n",
            "": f"{SMALL}{leaf}: '{value}'\n",
        }.get(section, f"{SMALL}{section}: {{{leaf}: '{value}'}}\n")
        messages = [line for line in lines_of(tmp_path, text) if f" {key}: " in line]
        assert len(messages) == 1, value
        assert f"here '{value}' is {ours}" in messages[0] or f"{ours} is not available" in messages[0]
