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
from tunesmith.recipe.values import PHRASES, ROADMAP, VALUES

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


def holding(section: str, entry: str) -> str:
    """SMALL with `entry` (`key: value`) in `section`."""
    return {
        "": f"{SMALL}{entry}\n",
        "model": SMALL.replace("{model_name", f"{{{entry}, model_name"),
        "model.quantization": SMALL.replace("{model_name", f"{{quantization: {{{entry}}}, model_name"),
        "data": SMALL.replace("{train", f"{{{entry}, train"),
        "data.train": SMALL.replace("{path", f"{{{entry}, path"),
        "objective": SMALL.replace("{type", f"{{{entry}, type"),
        "objective.loss": SMALL.replace("{type", f"{{loss: {{{entry}}}, type"),
        "tracking.wandb": f"{SMALL}tracking: {{wandb: {{{entry}}}}}\n",
        "trainable.head": f"{SMALL}trainable: {{head: {{{entry}}}}}\n",
        "trainable.adapters": f"{SMALL}trainable: {{adapters: [{{{entry}}}]}}\n",
        "trainable.unfreeze": f"{SMALL}trainable: {{unfreeze: {{{entry}}}}}\n",
        **{
            f"remember.{way}": f"{SMALL}remember: {{run: o, {way}: {{{entry}}}}}\n"
            for way in ("l2_sp", "anchor", "ewc", "lwf", "replay")
        },
    }.get(section, f"{SMALL}{section}: {{{entry}}}\n")


@pytest.mark.parametrize("name", [*KEYS, *NOTES])
def test_another_tools_key_gets_advice_where_it_is_meant(name: str, tmp_path: Path) -> None:
    section, _, leaf = name.rpartition(".")
    tag = {
        "trainable.adapters": "type: lora, ",
        "trainable.unfreeze": "every: 3, ",
        "objective.loss": "type: focal, ",
    }.get(section, "")
    text = holding(section, f"{tag}{leaf}: 1")
    if name == "trainable.unfreeze.every":
        text = f"{SMALL}trainable: {{unfreeze: [{{at: 1, layers: last 1, every: 1}}]}}\n"
    ours = KEYS.get(name)
    [line] = lines_of(tmp_path, text)
    if ours is None:
        assert line.endswith(f"{leaf}: {NOTES[name]}")
    else:
        assert line.endswith(f"here it is {ours}")


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
        text = holding(section, f"{leaf}: '{value}'")
        if key == "data.train.format":
            text = SMALL.replace("format: classification", f"format: '{value}'")
        elif key == "objective.type":
            text = SMALL.replace("type: classification", f"type: '{value}'")
        elif key == "model.quantization.compute_dtype":
            text = holding(section, f"type: nf4, {leaf}: '{value}'")
        messages = [line for line in lines_of(tmp_path, text) if f" {key}: " in line.replace(".0.", ".")]
        assert len(messages) == 1, value
        assert f"here '{value}' is {ours}" in messages[0] or f"{ours} is not available" in messages[0]


@pytest.mark.parametrize("word", PHRASES["trainable.adapters.type"])
def test_another_tools_method_is_an_error_that_writes_ours_out(word: str, tmp_path: Path) -> None:
    text = PHRASES["trainable.adapters.type"][word].text
    head = f"{SMALL}trainable: "
    [line] = lines_of(tmp_path, f"{head}{{adapters: [{{type: {word}}}]}}\n")
    assert line == f"r.yaml:4: trainable.adapters.0.type: here '{word}' is {text}"
    [line] = lines_of(tmp_path, f"{head}{{adapters: [{word}]}}\n")
    assert line.endswith(f"; write {text}")
    settings, _, beside = text.partition("}")
    [line] = lines_of(tmp_path, f"{head}{{adapters: {word}}}\n")
    assert line.endswith(f"; write [{settings}}}]{beside}")
    if not beside:
        assert load(tmp_path, f"{head}{{adapters: [{text}]}}\n").trainable.adapters[0].type in settings
