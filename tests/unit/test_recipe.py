"""The recipe loader: what loads, what it loads as, and that it loads back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.recipe import Recipe
from tunesmith.recipe.load import (
    RecipeError,
    load_recipe,
)
from tunesmith.recipe.shape import choices, settings

SMALL = """\
model: {model_name_or_path: m}
data: {train: {path: a.csv, format: classification}}
objective: {type: classification}
"""

DESIGN = """\
model:      {model_name_or_path: path-or-hub-id, init: pretrained, attn_implementation: sdpa, dropout: null, quantization: null}
data:
  train:    [{path: train.csv, format: classification, columns: {text: text, label: category}, weight: 1.0}]
  eval:     [{path: dev.csv,   format: classification, columns: {text: text, label: category}}]
  test:     [{path: test.csv,  format: classification, columns: {text: text, label: category}}]
  split:    null                          # or {eval: 0.1, test: 0.1, stratify: label}
  max_length: 128
  packing:  false
objective:  {type: classification}
trainable:  {freeze: [], unfreeze: [], adapters: [], head: null, layer_lr_decay: null}
optim:      {name: adamw, learning_rate: 3e-4, weight_decay: 0.01, max_grad_norm: 1.0}
schedule:   {lr_scheduler_type: linear, warmup_ratio: 0.1}
training:   {num_train_epochs: 3, max_steps: null, global_batch_size: 32, per_device_train_batch_size: 8, precision: fp32, seed: 0}
parallel:   {strategy: auto}
kernels:    auto
evaluation: {eval_steps: 200, metrics: [accuracy, macro_f1]}
checkpoint: {save_steps: 200, save_total_limit: 2, final: best}
tracking:   {logging_steps: 10, wandb: {mode: disabled, project: null}}
output_dir: runs
run_name:   banking77
"""  # noqa: E501


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


def test_the_design_example_loads_as_it_stands(tmp_path: Path) -> None:
    recipe = load(tmp_path, DESIGN)
    assert recipe.run_name == "banking77"
    assert recipe.optim.learning_rate == 3e-4
    assert recipe.training.epochs == 3.0
    assert recipe.data.train[0].columns == {"text": "text", "label": "category"}
    assert recipe.checkpoint.final == "best"


FORMAT_OF = {
    "causal_lm": "text",
    "masked_lm": "text",
    "span_corruption": "text",
    "sft": "messages",
    "classification": "classification",
    "token_classification": "tokens",
    "question_answering": "squad",
    "seq2seq": "translation",
}


@pytest.mark.parametrize("objective", FORMAT_OF)
def test_every_objective_of_the_design_example_loads(objective: str, tmp_path: Path) -> None:
    text = DESIGN.replace("format: classification", f"format: {FORMAT_OF[objective]}")
    recipe = load(
        tmp_path, text.replace("{type: classification}", f"{{type: {objective}}}"), "data.max_length=512"
    )
    assert recipe.objective.type == objective


@pytest.mark.parametrize("strategy", choices(settings(Recipe)["parallel.strategy"][0][0]))
def test_every_strategy_of_the_design_example_loads(strategy: str, tmp_path: Path) -> None:
    assert (
        load(tmp_path, DESIGN.replace("strategy: auto", f"strategy: {strategy}")).parallel.strategy
        == strategy
    )


def test_the_split_of_the_design_example_loads(tmp_path: Path) -> None:
    text = SMALL.replace("}}\n", "}, split: {eval: 0.1, test: 0.1, stratify: label}}\n")
    split = load(tmp_path, text).data.split
    assert split is not None
    assert (split.eval, split.test, split.stratify) == (0.1, 0.1, "label")


def test_defaults_the_run_name_and_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    write(tmp_path / "recipes", SMALL, "my run.yaml")
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(Path("recipes/my run.yaml"))
    assert loaded.recipe.run_name == "my-run"
    assert loaded.recipe.optim.name == "adamw"
    assert loaded.recipe.schedule.lr_scheduler_type == "linear"
    assert loaded.base == tmp_path / "recipes"


def test_yaml_1_2_values(tmp_path: Path) -> None:
    text = SMALL + (
        "optim: {learning_rate: 1e-4, weight_decay: 0, betas: [0.9, 0.95]}\n"
        "tracking: {progress: off}\n"
        "training: {max_steps: 1_000, seed: 012}\n"
        "run_name: 2024-01-01\n"
    )
    recipe = load(tmp_path, text)
    assert recipe.optim.learning_rate == 1e-4
    assert isinstance(recipe.optim.weight_decay, float)
    assert recipe.optim.name == "adamw"
    assert recipe.optim.betas == (0.9, 0.95)
    assert recipe.tracking.progress == "off"
    assert (recipe.training.max_steps, recipe.training.seed) == (1000, 12)
    assert recipe.run_name == "2024-01-01"


def test_anchors_merge_keys_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    text = (
        "\ufeffmodel: {model_name_or_path: m}\n"
        "data:\n"
        "  train: &rows {path: a.txt, format: text, limit: 5}\n"
        "  eval: [{<<: *rows, path: b.txt}, *rows]\n"
        "objective: {type: causal_lm}\n"
    )
    recipe = load(tmp_path, text.replace("\n", "\r\n"))
    assert [(s.path, s.limit) for s in recipe.data.eval] == [("b.txt", 5), ("a.txt", 5)]


def test_the_place_of_a_setting(tmp_path: Path) -> None:
    path = write(tmp_path, DESIGN)
    loaded = load_recipe(path, ["optim.learning_rate=1e-5", "data.eval.0.limit=3"])
    assert loaded.place("data.train.0.format") == f"{path}:3"
    assert loaded.place("data.train") == f"{path}:3"
    assert loaded.place("optim.learning_rate") == "override 'optim.learning_rate=1e-5'"
    assert loaded.place("optim.betas") == f"{path}:11"
    assert loaded.place("data.eval.0.limit") == "override 'data.eval.0.limit=3'"
    assert loaded.place("data.eval.0.path") == f"{path}:4"


def test_overrides(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        SMALL,
        "optim.learning_rate=2e-5",
        "data.train.0.path=b=c.csv",
        "data.train.columns={text: body}",
        "evaluation.metrics=[accuracy]",
        "data.test={path: t.csv, format: classification}",
        "schedule.lr_scheduler_type=cosine",
        "run_name='12'",
    )
    assert recipe.optim.learning_rate == 2e-5
    assert recipe.data.train[0].path == "b=c.csv"
    assert recipe.data.train[0].columns == {"text": "body"}
    assert recipe.data.test[0].path == "t.csv"
    assert recipe.evaluation.metrics == ["accuracy"]
    assert recipe.schedule.lr_scheduler_type == "cosine"
    assert recipe.run_name == "12"


def test_an_override_changes_one_use_of_an_anchor_only(tmp_path: Path) -> None:
    text = SMALL.replace("train: {path", "train: &rows {path").replace("}}\n", "}, eval: *rows}\n")
    recipe = load(tmp_path, text, "data.eval.path=b.csv")
    assert (recipe.data.train[0].path, recipe.data.eval[0].path) == ("a.csv", "b.csv")


BAD_OVERRIDES = {
    "seed": "override 'seed': must read section.key=value",
    "=3": "override '=3': must read section.key=value",
    "a b=3": "override 'a b=3': must read section.key=value",
    "training.seed=": "override 'training.seed=': training.seed: has no value; for none write null",
    "training.seed=[1": "override 'training.seed=[1': training.seed: not valid YAML: expected ',' or ']', but got "
    "'<stream end>': is the bracket of line 1 closed?",
    "training.sed=1": "override 'training.sed=1': training.sed: unknown key; did you mean seed?",
    "training.micro_batch_size=1": "override 'training.micro_batch_size=1': training.micro_batch_size: here it is "
    "training.per_device_train_batch_size",
    "training.seed='1'": "override 'training.seed='1'': training.seed: must be a whole number of at least 0, not "
    "'1'; remove the quotes",
    "run_name.x=1": "override 'run_name.x=1': run_name: is a single value: it has no keys",
    "data.train.path=x": "override 'data.train.path=x': data.train: is a list of 1 entry, counted from 0: it has no "
    "'path'",
    "data.train.1.path=x": "override 'data.train.1.path=x': data.train: is a list of 1 entry, counted from 0: it has "
    "no '1'",
    "training.max_steps=3": "override 'training.max_steps=3': training: num_train_epochs and max_steps exclude each "
    "other: keep one",
    "data.packing=true": "override 'data.packing=true': data.packing: packs causal_lm and sft only; the objective is "
    "classification",
    "data.train.0.format=tokens": "override 'data.train.0.format=tokens': data.train.0.format: objective "
    "classification does not read tokens; it reads classification, pairs",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_a_bad_override_is_named(override: str, tmp_path: Path) -> None:
    assert lines_of(tmp_path, DESIGN, override) == [BAD_OVERRIDES[override]]


def test_faults_of_the_file_and_of_all_overrides_come_together(tmp_path: Path) -> None:
    overrides = ["training.seed=x", "seed", "parallel.timeout=1", "parallel.timeout=2"]
    assert lines_of(tmp_path, SMALL + "foo: 1\n", *overrides) == [
        "r.yaml:4: foo: unknown key; a recipe takes " + ", ".join(Recipe.model_fields),
        "override 'seed': must read section.key=value",
        "override 'parallel.timeout=2': parallel.timeout: is given twice",
        "override 'training.seed=x': training.seed: must be a whole number of at least 0, not 'x'",
    ]


def test_an_override_that_begins_a_section_is_blamed_for_what_it_lacks(tmp_path: Path) -> None:
    text = SMALL.replace("objective: {type: classification}\n", "")
    [line] = lines_of(tmp_path, text, "objective.labels=[a]")
    assert line.startswith("override 'objective.labels=[a]': objective.type: is missing; it is one of ")


@pytest.mark.parametrize(
    "value",
    [
        "null",
        "true",
        "-1",
        "1.5",
        "x",
        "[[1]]",
        "{1: 2}",
        "[{name: [1]}]",
        "{type: {a: 1}}",
        "[{type: dora}]",
    ],
)
def test_whatever_stands_anywhere_a_fault_is_a_line(value: str, tmp_path: Path) -> None:
    messages: list[str] = []
    for number, key in enumerate(settings(Recipe)):
        if number % 3 == 0 or "." not in key or key.startswith(("trainable.", "model.quantization.")):
            try:
                load(tmp_path, SMALL, f"{key}={value}")
            except RecipeError as error:
                messages += [fault.message for fault in error.faults]
    assert len(messages) > 20
    assert not [message for message in messages if "\n" in message or "Input should" in message]


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, SMALL, "banking.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"# r\xc3\xa9cipe\nrun_name: caf\xe9\n")
    (tmp_path / "empty").mkdir()
    expected = {
        "bankin.yaml": "bankin.yaml: no such file; did you mean banking.yaml?",
        "banking": "banking: no such file; did you mean banking.yaml?",
        "nowhere/zzz.yaml": "nowhere/zzz.yaml: no such file",
        ".": ".: is a folder, not a recipe file; it holds banking.yaml, latin.yaml",
        "empty": "empty: is a folder, not a recipe file",
        "latin.yaml": "latin.yaml:2: is not UTF-8 (byte 0xe9): save the file as UTF-8",
    }
    for name, line in expected.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(Path(name))
        assert str(caught.value) == line


def test_a_shipped_recipe_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = {"banking77/minilm": Path("/shipped/banking77/minilm.yaml")}
    monkeypatch.setattr("tunesmith.recipe.load.shipped_recipes", lambda: shipped)
    with pytest.raises(RecipeError, match=r"no such file; did you mean /shipped/banking77/minilm\.yaml\?"):
        load_recipe(tmp_path / "minilm.yml")


def test_a_recipe_built_in_python_keeps_the_rules_too() -> None:
    values = {
        "model": {"model_name_or_path": "m"},
        "data": {"train": {"path": "a", "format": "text"}, "packing": True},
        "objective": {"type": "masked_lm"},
        "run_name": "r",
    }
    with pytest.raises(ValueError, match=r"data\.packing: packs causal_lm and sft only"):
        Recipe.model_validate(values)


def test_loading_is_light(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tunesmith.recipe.load import load_recipe;"
        f"load_recipe(Path({str(write(tmp_path, DESIGN))!r}));"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
