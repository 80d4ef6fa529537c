"""Penalties, sharpness, adversarial embeddings, noise, max-norm: on every engine what they are on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import kstest

from objective_cases import (
    ACCUMULATED,
    CASES,
    OFFLOADED,
    SGD,
    SHARDED,
    SPLIT,
    TWO,
    WHOLE,
    Run,
    assert_same_curves,
    assert_same_weights,
)
from tunesmith.errors import UserError

ENGINES: dict[str, dict[str, Any]] = {"ddp": {"strategy": "ddp"}, **SHARDED, **OFFLOADED}

SETTINGS: dict[str, dict[str, Any]] = {
    "l1": {"l1": 1e-3},
    "l2": {"l2": {"coefficient": 1e-2, "parameters": ["all"]}},
    "sam": {"sharpness": {"type": "sam", "rho": 0.05}},
    "asam": {"sharpness": {"type": "asam", "rho": 0.5, "every": 2}},
    "fgm": {"adversarial": {"type": "fgm", "epsilon": 0.5}},
    "pgd": {"adversarial": {"type": "pgd", "epsilon": 0.5, "steps": 2, "weight": 0.7}},
    "gradient_noise": {"gradient_noise": {"eta": 1e-4}},
    "max_norm": {"max_norm": {"value": 0.15}},
    "all": {
        "l1": 1e-3,
        "l2": 1e-2,
        "sharpness": {"type": "sam", "rho": 0.05},
        "adversarial": {"type": "fgm", "epsilon": 0.5},
        "gradient_noise": {"eta": 1e-4},
        "max_norm": {"value": 0.15},
    },
}


def cells() -> list[Any]:
    """All settings at once on every engine, each by itself for the long test run."""
    fast = {("all", strategy) for strategy in ("accumulated", "ddp", *SHARDED)}
    return [
        pytest.param(settings, strategy, marks=[] if (settings, strategy) in fast else pytest.mark.slow)
        for settings in SETTINGS
        for strategy in ("accumulated", *ENGINES)
    ]


@pytest.mark.parametrize(("settings", "strategy"), cells())
def test_every_engine_regularizes_alike(train: Run, settings: str, strategy: str) -> None:
    asked = SETTINGS[settings]
    one = train("single_label", SGD, WHOLE, 8, regularization=asked)
    if strategy == "accumulated":
        two = train("single_label", SGD, ACCUMULATED, 8, regularization=asked)
    else:
        two = train("single_label", SGD, TWO, 8, regularization=asked, parallel=ENGINES[strategy])
    assert_same_curves(two, one)
    assert_same_weights(two, one)
    plain = train("single_label", SGD, WHOLE, 8)
    moved = max(float((one.weights[n] - w).abs().max()) for n, w in plain.weights.items())
    assert moved > 1e-4, "the setting did nothing"


WITHOUT_EMBEDDINGS = {key: value for key, value in SETTINGS["all"].items() if key != "adversarial"}


@pytest.mark.parametrize("case", ["sft", "causal_lm_gpt2", "seq2seq_t5", "question_answering"])
@pytest.mark.parametrize("strategy", ["accumulated", "zero3", "fsdp2"])
@pytest.mark.slow
def test_other_objectives(train: Run, case: str, strategy: str) -> None:
    one = train(case, SGD, WHOLE, 5, regularization=SETTINGS["all"])
    layout, parallel = (
        (ACCUMULATED, {}) if strategy == "accumulated" else (TWO, {"parallel": SHARDED[strategy]})
    )
    two = train(case, SGD, layout, 5, regularization=SETTINGS["all"], **parallel)
    assert_same_curves(two, one)
    assert_same_weights(two, one)


@pytest.mark.slow
def test_packed_rows_and_split_layers(train: Run) -> None:
    """A packed sequence's perturbation is its own, whatever stands beside it; tensor parallelism cuts columns too."""
    packed = {"regularization": SETTINGS["all"], "data": {"packing": True}}
    one, two = (train("sft", SGD, layout, 5, **packed) for layout in (WHOLE, TWO))
    assert_same_curves(two, one)
    assert_same_weights(two, one)
    one = train("sft", SGD, WHOLE, 5, regularization=WITHOUT_EMBEDDINGS)
    two = train("sft", SGD, TWO, 5, regularization=WITHOUT_EMBEDDINGS, parallel=SPLIT)
    assert_same_curves(two, one)
    assert_same_weights(two, one)


@pytest.mark.parametrize("strategy", ["zero2", pytest.param("ddp", marks=pytest.mark.slow),
                                      pytest.param("fsdp2", marks=pytest.mark.slow)])  # fmt: skip
def test_what_is_not_trained_yet_is_left_alone(train: Run, workshop: Path, strategy: str) -> None:
    """The embeddings would open after the last step: no penalty, noise, perturbation or projection reaches them."""
    sections = {"trainable": {"unfreeze": {"every": 3}}, "regularization": SETTINGS["all"]}
    one = train("single_label", SGD, WHOLE, 8, **sections)
    two = train(
        "single_label", SGD, TWO, 8, **sections, parallel=(SHARDED | {"ddp": {"strategy": "ddp"}})[strategy]
    )
    assert_same_curves(two, one)
    assert_same_weights(two, one)
    before = load_file(workshop / "models" / CASES["single_label"].model / "model.safetensors")
    for found in (one, two):
        assert {name for name, value in before.items() if value.equal(found.weights[name])} >= {
            name for name in before if "embeddings" in name
        }


def test_the_log_has_the_penalty_beside_the_loss(train: Run, workshop: Path) -> None:
    found = train("single_label", SGD, WHOLE, 8, regularization=SETTINGS["l1"])
    before = load_file(workshop / "models" / CASES["single_label"].model / "model.safetensors")
    total = sum(float(v.double().abs().sum()) for v in before.values() if v.dim() > 1)
    assert found.rows[0]["penalty/l1"] == pytest.approx(1e-3 * total, rel=1e-6)
    plain = train("single_label", SGD, WHOLE, 8)
    assert found.rows[0]["loss"] == plain.rows[0]["loss"]


def test_the_noise_is_added_to_what_clipping_leaves(train: Run) -> None:
    clipped = {**SGD, "optim": {**SGD["optim"], "max_grad_norm": 0.1}}
    plain = train("single_label", clipped, WHOLE, 1)
    noisy = train("single_label", clipped, WHOLE, 1, regularization={"gradient_noise": {"eta": 0.01}})
    assert noisy.curve("grad_norm") == plain.curve("grad_norm")
    added = torch.cat([(noisy.weights[n] - w).reshape(-1) for n, w in plain.weights.items()])
    # σ = √0.01, times the learning rate
    assert kstest((added / 0.005).numpy(), "norm").pvalue > 1e-3


def test_fp16_scales_what_is_added(train: Run) -> None:
    strong = {"l2": 0.1, "sharpness": {"type": "sam"}, "adversarial": {"type": "fgm"}}
    whole, half = (
        train("single_label", SGD, WHOLE, 5, regularization=strong, training={"precision": precision})
        for precision in ("fp32", "fp16")
    )
    assert half.facts["precision"] == "fp16"
    for key in ("loss", "grad_norm"):
        assert half.curve(key) == pytest.approx(whole.curve(key), rel=2e-2), key


@pytest.mark.parametrize(
    ("settings", "sections", "told"),
    [
        ({"r_drop": {}}, {}, r"regularization\.r_drop: has no effect: nothing that is trained of Bert"),
        (
            {"l1": {"coefficient": 1.0, "parameters": ["*.nothing"]}},
            {},
            r"regularization\.l1\.parameters: '\*\.noth",
        ),
        (
            {"max_norm": {"value": 1.0, "parameters": ["embeddings"]}},
            {"trainable": {"freeze": ["embeddings"]}},
            r"regularization\.max_norm: none of these parameters is trained",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(
    train: Run, settings: dict[str, Any], sections: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        train("single_label", SGD, WHOLE, 1, regularization=settings, **sections)
