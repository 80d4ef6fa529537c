"""What the recipe is turned into: YAML that loads back, and the JSON Schema."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from tunesmith.recipe import Recipe
from tunesmith.recipe.load import (
    dump_recipe,
    json_schema,
    load_recipe,
    shipped_recipes,
)
from tunesmith.recipe.shape import settings

SMALL = """\
model: {model_name_or_path: m}
data: {train: {path: a.csv, format: classification}}
objective: {type: classification}
"""

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


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    return load_recipe(write(folder, text), overrides).recipe


ODD_TEXTS = ["off", "yes", "null", "~", "1e-4", "012", "2024-01-01", "true", "a: b", "# x", "'", '"', " a ", "a\nb\n",
             "", "é 漢 🙂", "<<", "=", "*a", "&a", "!a", "%", "@", "\t", "-", "{}", "[1]", "0x1F", "1_0",
             ".5", "\x85", "\u2028"]  # fmt: skip


TRAINED: list[dict[str, Any]] = [
    {"freeze": ["backbone"],
     "unfreeze": ["norms", {"at": 0.2, "layers": "last 2"}, {"at": "1.5 epochs", "layers": "2-5"},
                                          {"at": 100, "parameters": ["*.bias"], "warmup_steps": 3}]},
    {"unfreeze": {"every": "1 epoch"}, "layer_lr_decay": 0.9},
    {"learning_rates": {"head": 1e-3, "*.weight": 0}},
    {"adapters": {"type": "lora", "r": 4, "target_modules": ["off", "1e-4"], "rank_pattern": {"a.*": 3}}},
    {"adapters": [{"type": "lora", "init_lora_weights": False}, {"type": "existing", "path": "a: b", "name": "off"}]},
    {"adapters": [{"type": "ia3", "target_modules": "x|y"}]},
    {"adapters": [{"type": "prompt_tuning", "prompt_tuning_init_text": "yes"}]},
    {"adapters": [{"type": "peft", "peft_type": "VERA", "config": {"r": 8, "d_initial": 0.1, "x": None}}]},
    {"adapters": [{"type": "lora", "init_lora_weights": "pissa_niter_4"}]},
]  # fmt: skip
QUANTIZED: list[Any] = [
    "nf4",
    {"type": "fp4", "double_quant": False},
    {"type": "int8", "skip_modules": ["off"]},
    None,
]


def variants() -> list[dict[str, Any]]:
    """Recipes over all members of the tagged unions, with random settings and texts that YAML could misread."""
    chance = random.Random(0)
    known = settings(Recipe)
    found: list[dict[str, Any]] = []
    for index in range(80):
        pick = chance.choice(sorted(FORMAT_OF))
        source = {
            "path": chance.choice(ODD_TEXTS),
            "format": FORMAT_OF[pick],
            "weight": chance.choice([1, 0.1, 1e-7, 3e22]),
            "columns": {chance.choice(ODD_TEXTS): chance.choice([["a", "off"], "1e-4"])},
            "constants": {"label": chance.choice(ODD_TEXTS), "n": chance.choice([1, 1.0, -0.5, 1e300])},
        }
        recipe: dict[str, Any] = {
            "model": {"model_name_or_path": "m", "config": {"a": [1, None, {"b": chance.choice(ODD_TEXTS)}]}},
            "data": {"train": source},
            "objective": {"type": pick},
            "optim": {"name": chance.choice([tag for _, tag in known["optim.learning_rate"]])},
            "schedule": {
                "lr_scheduler_type": chance.choice([tag for _, tag in known["schedule.lr_scheduler_type"]])
            },
            "run_name": f"r{index}",
        }
        if recipe["optim"]["name"] in ("adam", "adamw"):
            recipe["optim"]["betas"] = [chance.random(), chance.random()]
        recipe["schedule"] |= {"step": {"step_size": 3}, "cyclic": {"cycle_steps": 4}}.get(
            recipe["schedule"]["lr_scheduler_type"], {}
        )
        if chance.random() < 0.5 or recipe["schedule"]["lr_scheduler_type"] == "reduce_on_plateau":
            recipe["data"] |= {"eval": [source, source]}
            recipe["evaluation"] = {"early_stopping": {}, "metrics": [chance.choice(ODD_TEXTS)]}
        if pick in ("causal_lm", "sft") and chance.random() < 0.5:
            recipe["data"]["packing"] = True
        recipe["trainable"] = chance.choice(TRAINED)
        if "adapters" in recipe["trainable"]:
            recipe["model"]["quantization"] = chance.choice(QUANTIZED)
        if "prompt_tuning" in str(recipe["trainable"]):
            recipe["data"]["packing"] = False
        if pick == "classification" and chance.random() < 0.5:
            recipe["trainable"] = {"head": {"hidden_layers": [8, 4], "pooling": "mean"}, "freeze": ["backbone"],
                                   "cache_features": True}  # fmt: skip
        if chance.random() < 0.5:
            recipe["tracking"] = {
                "wandb": {"mode": "offline", "project": chance.choice(ODD_TEXTS), "tags": ["a", "off"]}
            }
        found.append(recipe)
    return found


def test_what_is_written_loads_back_equal(tmp_path: Path) -> None:
    for values in variants():
        recipe = Recipe.model_validate(values)
        text = dump_recipe(recipe)
        assert load(tmp_path, text) == recipe
        assert dump_recipe(load(tmp_path, text)) == text


def test_shipped_recipes_load_and_load_back(tmp_path: Path) -> None:
    for path in shipped_recipes().values():
        recipe = load_recipe(path).recipe
        assert load(tmp_path, dump_recipe(recipe)) == recipe


def test_the_written_recipe_is_complete(tmp_path: Path) -> None:
    evaluated = SMALL.replace("}}\n", "}, eval: {path: b.csv, format: classification}}\n")
    text = dump_recipe(load(tmp_path, evaluated))
    for key, owners in settings(Recipe).items():
        optional = (
            "data.split.",
            "evaluation.early_stopping.",
            "evaluation.generate.",
            "model.tokenizer.",
            "kernels.",
            "model.quantization.",
            "trainable.adapters.",
            "trainable.head.",
            "trainable.unfreeze.",
            "averaging.",
            "data.augment.",
            "data.curriculum.",
            "data.max_length_schedule.",
            "data.sampling.",
            "distill.",
            "objective.loss.",
            "regularization.adversarial.",
            "regularization.gradient_noise.",
            "regularization.l1.",
            "regularization.l2.",
            "regularization.max_norm.",
            "regularization.r_drop.",
            "regularization.sharpness.",
            "remember.",
            "evaluation.tune_thresholds.",
            "multitask",
            "tasks.",
        )
        tags = [tag for _, tag in owners]
        if not key.startswith(optional) and (
            tags == [None] or {"adamw", "linear", "classification"} & set(tags)
        ):
            assert f"{key.rpartition('.')[2]}:" in text, key


def test_defaults_without_effect_are_not_written(tmp_path: Path) -> None:
    text = dump_recipe(load(tmp_path, SMALL))
    assert "eval_steps" not in text
    assert "final:" not in text
    assert "save_steps" in text


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> list[str]:
    """The part of JSON Schema 2020-12 that the recipe's schema uses."""
    if "$ref" in schema:
        return violations(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    found: list[str] = []
    for word, least, most in (("anyOf", 1, 99), ("oneOf", 1, 1)):
        if word in schema:
            fits = sum(not violations(value, option, root) for option in schema[word])
            found += [] if least <= fits <= most else [f"{word}: {fits} fit {value!r}"]
    if "const" in schema and value != schema["const"]:
        found.append(f"{value!r} is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{value!r} is not in {schema['enum']}")
    kinds: dict[str, Any] = {"object": dict, "array": list, "string": str, "null": type(None), "boolean": bool,
                             "integer": int, "number": (int, float)}  # fmt: skip
    kind = schema.get("type")
    if kind is not None and (
        not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean")
    ):
        return [*found, f"{value!r} is no {kind}"]
    if isinstance(value, dict):
        properties, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{name} is missing" for name in schema.get("required", []) if name not in value]
        for key, inner in value.items():
            if key not in properties and more is False:
                found.append(f"{key} is unknown")
            found += violations(inner, properties.get(key, more if isinstance(more, dict) else {}), root)
    if isinstance(value, list):
        for index, item in enumerate(value):
            prefix = schema.get("prefixItems", [])
            found += violations(item, prefix[index] if index < len(prefix) else schema.get("items", {}), root)
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{len(value)} items")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value < schema.get("minimum", value) or value > schema.get("maximum", value):
            found.append(f"{value} is out of range")
        if value <= schema.get("exclusiveMinimum", -math.inf) or value >= schema.get(
            "exclusiveMaximum", math.inf
        ):
            found.append(f"{value} is out of range")
    return found


def test_the_schema_takes_what_loads() -> None:
    schema = json_schema()
    for values in variants()[:50]:
        assert violations(values, schema, schema) == []
        unnamed = {key: value for key, value in values.items() if key != "run_name"}
        assert violations(unnamed, schema, schema) == []


@pytest.mark.parametrize(
    "change",
    [
        {"model": None}, {"foo": 1}, {"optim": {"name": "sgd", "betas": [0.9, 0.9]}}, {"training": {"max_steps": 0}},
        {"objective": {"type": "ner"}}, {"data": {"train": [{"path": "a"}]}}, {"kernels": True},
        {"checkpoint": {"save_steps": "x"}}, {"schedule": {"lr_scheduler_type": "step"}},
        {"trainable": {"adapters": [{"type": "dora"}]}}, {"trainable": {"adapters": [{"type": "ia3", "r": 3}]}},
        {"trainable": {"unfreeze": [{"layers": "last 2"}]}}, {"trainable": {"unfreeze": {"every": 1.5}}},
        {"model": {"model_name_or_path": "m", "quantization": {"type": "int8", "double_quant": True}}},
        {"optim": {"betas": [0.9]}}, {"optim": {"betas": [0.9, 1.0]}}, {"training": {"seed": True}},
    ],
)  # fmt: skip
def test_the_schema_refuses_what_does_not_load(change: dict[str, Any]) -> None:
    schema = json_schema()
    good = {"model": {"model_name_or_path": "m"}, "data": {"train": {"path": "a", "format": "text"}},
            "objective": {"type": "causal_lm"}}  # fmt: skip
    assert violations(good, schema, schema) == []
    assert violations({**good, **change}, schema, schema)
    with pytest.raises(ValueError, match="validation error"):
        Recipe.model_validate({"run_name": "r", **good, **change})


def test_the_schema_describes_every_section_and_most_settings() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert "`dtype`" not in str(schema)
    for name, definition in schema["$defs"].items():
        assert definition["description"] or name in {"RMSprop", "Adagrad"}, name
    assert schema["$defs"]["Training"]["properties"]["global_batch_size"]["description"].startswith(
        "`global_batch_size`"
    )
    assert schema["$defs"]["Cosine"]["properties"]["warmup_steps"]["description"].startswith(
        "Warm-up is linear"
    )
