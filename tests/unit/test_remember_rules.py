"""What `remember` refuses, in one line that names the setting."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tunesmith.recipe import Recipe
from tunesmith.recipe.load import dump_recipe, load_recipe

SMALL: dict[str, Any] = {
    "model": {"model_name_or_path": "runs/old/final"},
    "data": {"train": [{"path": "a.csv", "format": "classification"}]},
    "objective": {"type": "classification"},
    "run_name": "r",
}
RUN = {"run": "runs/old"}
LORA = {"adapters": [{"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}]}
PROMPTS = {"adapters": [{"type": "prompt_tuning", "num_virtual_tokens": 4}]}
HEAD = {"freeze": ["backbone"]}
DRAWN = {"init": "from_config"}
TEXT = {"path": "a.txt", "format": "text"}
ROWS = {"path": "a.csv", "format": "classification"}
FSDP2 = {"strategy": "fsdp2"}


def made(**sections: Any) -> Recipe:
    merged = {
        name: {**SMALL.get(name, {}), **of} if isinstance(of, dict) else of for name, of in sections.items()
    }
    return Recipe.model_validate({**SMALL, **merged})


@pytest.mark.parametrize(
    ("remember", "sections", "said"),
    [
        ({}, {}, "remember: has no effect: set run or probes"),
        ({**RUN, "seed": 1}, {}, "remember.seed: has no effect without remember.ewc"),
        ({"l2_sp": {}, "anchor": {}}, {}, "remember.anchor: and l2_sp hold the same weights"),
        ({"wise_ft": {"alpha": 1.0}}, {}, "remember.wise_ft.alpha: has no effect at 1"),
        ({"wise_ft": {"alpha": 0.0}}, {}, "remember.wise_ft.alpha: at 0 leaves nothing"),
        ({**RUN, "probes": {"old": {"run": "runs/other"}}}, {}, "remember.probes.old: is the name of the probe of"),
        (
            {"probes": {"one": {"run": "runs/a"}, "two": {"run": "runs/./a"}}},
            {},
            "remember.probes.two: evaluates the same rows as probes.one",
        ),
        ({"l2_sp": {}}, {"model": DRAWN}, "remember.l2_sp: has nothing to hold on to: model.init: from_config"),
        ({"wise_ft": {}}, {"model": DRAWN}, "remember.wise_ft: has nothing to hold on to"),
        (RUN, {"model": DRAWN}, "remember.run: is not what the run begins with"),
        ({"run": "runs/old/final/"}, {}, "remember.run: is a run's folder: write runs/old"),
        (
            {"run": "runs/b", "ewc": {}},
            {},
            "remember.run: is not what the run begins with (runs/old/final): set model.model_name_or_path: runs/b",
        ),
        ({"l2_sp": {}}, {"trainable": LORA}, "remember.l2_sp: and adapters exclude each other"),
        ({"anchor": {}}, {"trainable": LORA}, "remember.anchor: and adapters exclude each other"),
        ({**RUN, "ewc": {}}, {"trainable": LORA}, "remember.ewc: and adapters exclude each other"),
        ({"wise_ft": {}}, {"trainable": LORA}, "average --method task --weights ALPHA RUN"),
        (RUN, {"trainable": PROMPTS}, "remember.run: is measured on the backbone's weights, which prompt_tuning"),
        ({"l2_sp": {}}, {"trainable": HEAD}, "remember.l2_sp: has no effect: trainable.freeze keeps the backbone"),
        ({**RUN, "ewc": {}}, {"trainable": {**HEAD, "unfreeze": ["head"]}}, "remember.ewc: has no effect"),
        ({**RUN, "lwf": {}}, {"trainable": HEAD}, "remember.lwf: has no effect"),
        ({"wise_ft": {}}, {"trainable": {**HEAD, "cache_features": True}}, "remember.wise_ft: has no effect"),
        (RUN, {"model": {"add_tokens": ["<a>"]}}, "model.add_tokens: makes other embeddings"),
        (RUN, {"model": {"tokenizer": {"type": "train_bpe"}}}, "model.tokenizer: makes other embeddings"),
        ({"ewc": {}}, {}, "remember.ewc: needs old rows: set remember.run (a finished run) or remember.ewc.data"),
        (
            {"ewc": {"data": [ROWS]}},
            {"objective": {"problem": "regression"}},
            "remember.ewc.labels: answers are not drawn from what a model of regression predicts: set labels: data",
        ),
        ({"ewc": {"data": [TEXT]}}, {}, "remember.ewc.data.0.format: objective classification does not read text"),
        (
            {**RUN, "lwf": {}},
            {"data": {"train": [TEXT], "packing": True}, "objective": {"type": "causal_lm"}},
            "remember.lwf: a packed sequence has no rows for the old head",
        ),
        (
            {**RUN, "lwf": {}},
            {"data": {"augment": [{"type": "mixup"}]}},
            "data.augment.0.type: mixup: the old model reads whole rows",
        ),
        (
            {**RUN, "lwf": {}},
            {"parallel": {**FSDP2, "tensor_parallel_size": 2}},
            "parallel.tensor_parallel_size: the old model (remember.lwf) sees whole rows",
        ),
        (
            {**RUN, "lwf": {}},
            {"distill": {"teacher_model_name_or_path": "runs/old"}},
            "remember.lwf: and distill keep to the answers of the same model",
        ),
        ({"lwf": {}}, {}, "lwf: needs the run to be remembered: set remember.run"),
    ],
)  # fmt: skip
def test_it_is_refused_by_name(remember: dict[str, Any], sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        made(remember=remember, **sections)


@pytest.mark.parametrize(
    ("remember", "sections"),
    [
        (RUN, {}),
        ({"probes": {"old": {"run": "runs/b"}, "other": {"run": "runs/b", "split": "eval"}}}, {}),
        ({**RUN, "probes": {"old": {"run": "./runs/old", "limit": 9}}}, {}),
        ({"run": "$RUNS/old", "l2_sp": {}}, {}),
        ({"run": "/runs/old"}, {}),
        ({**RUN, "l2_sp": {}, "ewc": {}, "wise_ft": {}, "lwf": {}}, {}),
        ({**RUN, "lwf": {}}, {"trainable": LORA}),
        ({"l2_sp": {}}, {"trainable": {**HEAD, "unfreeze": ["norms"]}}),
        ({"anchor": {}}, {"trainable": {"unfreeze": {"every": "1 epoch"}}}),
        ({"wise_ft": {}}, {"averaging": {"type": "ema"}}),
        ({"ewc": {"data": [ROWS], "labels": "data"}}, {"objective": {"problem": "regression"}}),
    ],
)
def test_what_goes_together_is_taken(remember: dict[str, Any], sections: dict[str, Any]) -> None:
    made(remember=remember, **sections)


def test_the_resolved_recipe_loads(tmp_path: Any) -> None:
    """Without the defaults that would have no effect."""
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(made(remember={**RUN, "l2_sp": {}})), encoding="utf-8")
    assert load_recipe(path).recipe == made(remember={**RUN, "l2_sp": {}})
