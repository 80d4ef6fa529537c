"""Freezing, unfreezing over time and learning rates by layer: by hand in plain torch, and alike on every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from objective_cases import (
    ADAMW,
    CASES,
    OFFLOADED,
    SGD,
    SHARDED,
    TOLERANCE,
    TWO,
    WHOLE,
    Result,
    Run,
    apart,
    assert_same_curves,
    assert_same_weights,
    open_rows,
    recipe,
    weights_apart,
)
from rank_pool import Pools
from test_plain_loop import PLAIN, plain_model
from test_strategies_resume import interrupted
from tunesmith.checkpoint.pieces import Saved
from tunesmith.run import Resume

ENGINES = {"ddp": {"strategy": "ddp"}, **SHARDED, **OFFLOADED}

# two layers: the head from the start, the top layer and the pooler after 4 steps, layer 0 after 8, embeddings after 12
GRADUAL: dict[str, Any] = {
    "unfreeze": {"every": 4, "warmup_steps": 2},
    "layer_lr_decay": 0.8,
    "freeze": ["*.position_embeddings.*"],
}
OPENS = {"classifier": 0, "bert.pooler": 4, "bert.encoder.layer.1": 4, "bert.encoder.layer.0": 8}
FACTOR = {"classifier": 1.0, "bert.pooler": 1.0, "bert.encoder.layer.1": 0.8, "bert.encoder.layer.0": 0.8**2}
# never reached, or reached late, and in another order than from the top
MOMENTS: dict[str, Any] = {
    "freeze": ["embeddings", "norms"],
    "unfreeze": [
        "*.LayerNorm.bias",
        {"at": 0.25, "layers": "first 1"},
        {"at": 3, "parameters": ["*.pooler.*"]},
    ],
    "learning_rates": {"head": 0.02, "biases": 0.01},
}


def place(name: str) -> str:
    return next((part for part in OPENS if name.startswith(part)), "embeddings")


def factor_at(name: str, step: int) -> float:
    """0 where it is frozen."""
    opens = OPENS.get(place(name), 12)
    if "position_embeddings" in name or step < opens:
        return 0.0
    warm = min(1.0, (step - opens + 1) / 3) if opens else 1.0
    return FACTOR.get(place(name), 0.8**3) * warm


@pytest.mark.parametrize("asked", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_gradual_unfreezing_by_hand(train: Run, workshop: Path, asked: dict[str, Any]) -> None:
    """A plain loop with torch's optimizer, to which each parameter is added when it opens."""
    case, settings = CASES["single_label"], asked["optim"]
    found = train("single_label", asked, WHOLE, 20, trainable=GRADUAL)
    rows = open_rows(recipe(workshop, case, asked, WHOLE, 20), workshop)
    model = plain_model(workshop, case)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    kind: Any = torch.optim.SGD if asked is SGD else torch.optim.AdamW
    optimizer: torch.optim.Optimizer | None = None
    losses: list[float] = []
    norms: list[float] = []
    for step in range(20):
        for name, parameter in model.named_parameters():
            if factor_at(name, step) > 0 and not parameter.requires_grad:
                parameter.requires_grad_(True)
                decay = settings.get("weight_decay", 0.0) if parameter.dim() > 1 else 0.0
                group = {"params": [parameter], "name": name, "weight_decay": decay}
                if optimizer is None:
                    optimizer = kind([group], lr=0.0)
                else:
                    optimizer.add_param_group({**group, "lr": 0.0})
        assert optimizer is not None
        schedule = settings["learning_rate"] * (1.0 if asked is SGD else 1 - step / 20)
        for group in optimizer.param_groups:
            group["lr"] = schedule * factor_at(group["name"], step)
        optimizer.zero_grad()
        loss = PLAIN["single_label"].loss(model, rows(step))
        loss.backward()
        norm = clip(model, settings["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    for key, expected in (("loss", losses), ("grad_norm", norms)):
        worst = max(apart(a, b) for a, b in zip(found.curve(key), expected, strict=True))
        assert worst < 1e-6, f"{key} differs by {worst:.1e}"
    if asked is SGD:
        expected = {name: model.state_dict()[name] for name in found.weights}
        assert max(weights_apart(found.weights, expected).values()) < 1e-6
    logged = {key: value for key, value in found.rows[9].items() if key.startswith("learning_rate/")}
    base = found.rows[9]["learning_rate"]
    assert logged.keys() == {
        f"learning_rate/{part}"
        for part in ("head", "what follows the layers", "layer 1", "layer 0", "embeddings")
    }
    assert logged["learning_rate/layer 0"] == pytest.approx(base * 0.8**2 * 2 / 3)
    assert logged["learning_rate/embeddings"] == 0.0


def clip(model: torch.nn.Module, max_norm: float | None) -> float:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())
    if max_norm is not None:
        for gradient in gradients:
            gradient.mul_(min(1.0, max_norm / (norm + 1e-6)))
    return norm


def some_slow(*fast: str) -> list[Any]:
    """The engines, those that are not `fast` for the long test run."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in ENGINES]


@pytest.mark.parametrize("strategy", some_slow("ddp", *SHARDED))
def test_every_engine_unfreezes_gradually(train: Run, workshop: Path, strategy: str) -> None:
    unfreezes_alike(train, workshop, strategy, GRADUAL)


@pytest.mark.parametrize("strategy", some_slow("zero2"))
def test_every_engine_unfreezes_at_moments(train: Run, workshop: Path, strategy: str) -> None:
    unfreezes_alike(train, workshop, strategy, MOMENTS)


def unfreezes_alike(train: Run, workshop: Path, strategy: str, trainable: dict[str, Any]) -> None:
    one = train("single_label", SGD, WHOLE, 20, trainable=trainable)
    two = train("single_label", SGD, TWO, 20, trainable=trainable, parallel=ENGINES[strategy])
    assert_same_curves(two, one)
    assert_same_weights(two, one)
    assert_frozen_parts_stayed(workshop, two, trainable)


@pytest.mark.parametrize("strategy", some_slow("zero1", "fsdp2"))
def test_every_engine_unfreezes_alike_under_adamw(train: Run, workshop: Path, strategy: str) -> None:
    """A counter that had run, or a decay that had worked, before the opening would be seen in the losses."""
    one = train("single_label", ADAMW, WHOLE, 20, trainable=GRADUAL)
    two = train("single_label", ADAMW, TWO, 20, trainable=GRADUAL, parallel=ENGINES[strategy])
    assert_same_curves(two, one)
    assert_frozen_parts_stayed(workshop, two, GRADUAL)


def assert_frozen_parts_stayed(workshop: Path, run: Result, trainable: dict[str, Any]) -> None:
    before = load_file(workshop / "models" / CASES["single_label"].model / "model.safetensors")
    frozen = {name for name in before if name.endswith("position_embeddings.weight")}
    if trainable is MOMENTS:
        frozen = {name for name in before if "embeddings" in name and not name.endswith("LayerNorm.bias")}
        frozen |= {name for name in before if name.endswith("LayerNorm.weight") and "layer.0" not in name}
    for name, value in before.items():
        # a bias of keys adds the same to every score of a query: its gradient is what rounding leaves
        if not name.endswith("key.bias"):
            assert value.equal(run.weights[name]) == (name in frozen), name


@pytest.mark.parametrize("strategy", ["single", *some_slow("ddp", "zero2", "zero3", "fsdp2")])
def test_what_is_closed_has_no_state_and_a_resumed_run_opens_it(
    workshop: Path, pools: Pools, strategy: str
) -> None:
    """Checkpoints before the first opening, between two, and a step before one; continued from the latter, the run
    ends with the same bits."""
    parallel = {"strategy": "single"} if strategy == "single" else ENGINES[strategy]
    made = recipe(
        workshop, CASES["single_label"], ADAMW, WHOLE if strategy == "single" else TWO, 10,
        trainable=GRADUAL, parallel=parallel,
        checkpoint={"save_steps": 3, "save_total_limit": None, "final": "last"},
    )  # fmt: skip
    runs = workshop / "runs"
    whole = made.model_copy(update={"run_name": f"unfreezing-{strategy}"})
    start(pools, whole, workshop, strategy)
    before = load_file(workshop / "models" / CASES["single_label"].model / "model.safetensors")
    for step in (3, 6, 9):
        checkpoint = runs / whole.run_name / f"checkpoint-{step}"
        opened = {name for name in before if factor_at(name, step - 1) > 0}
        state = {name.removeprefix("model.") for name in Saved(checkpoint, "optimizer").names()}
        assert state == opened, f"step {step}"
        weights = Saved(checkpoint, "weights")
        moved = {name for name in before if not weights.whole(name).float().equal(before[name])}
        assert moved == opened, f"step {step}"
    for step in (3, 6):  # the last step before an opening at 4, and the middle of a warm-up before one at 8
        again = made.model_copy(update={"run_name": f"unfreezing-{strategy}-{step}"})
        interrupted(runs / whole.run_name, runs / again.run_name, step)
        start(pools, again, workshop, strategy, Resume(resume=True))
        a, b = (final(runs / name) for name in (whole.run_name, again.run_name))
        for name, tensor in a.items():
            assert tensor.equal(b[name]), name


def start(pools: Pools, made: Any, workshop: Path, strategy: str, how: Resume | None = None) -> None:
    from tunesmith.run import run

    if strategy == "single":
        run(made, workshop, how or Resume())
    else:
        pools[2].run(made, workshop, how)


def final(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "final" / "model.safetensors")


def test_an_encoder_and_a_decoder_open_from_their_tops(train: Run) -> None:
    """T5's shared embedding is its head's too, and so is trained from the start."""
    gradual = {"unfreeze": {"every": 3}}
    one = train("seq2seq_t5", SGD, WHOLE, 12, trainable=gradual)
    two = train("seq2seq_t5", SGD, TWO, 12, trainable=gradual, parallel={"strategy": "fsdp2"})
    assert_same_curves(two, one)
    rates = {key.removeprefix("learning_rate/"): [row[key] > 0 for row in one.rows] for key in one.rows[0]
             if key.startswith("learning_rate/")}  # fmt: skip
    assert {part: opened.index(True) for part, opened in rates.items()} == {
        "embeddings": 0, "what follows the layers and layer 1": 3, "layer 0": 6
    }  # fmt: skip


def test_every_optimizer_passes_over_what_is_closed(train: Run, workshop: Path) -> None:
    for name in ("adam", "rmsprop", "adagrad", "adafactor", "adamw_8bit"):
        asked = {
            **SGD,
            "optim": {"name": name, "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.1},
        }
        found = train("single_label", asked, WHOLE, 6, trainable=GRADUAL)
        before = load_file(workshop / "models" / CASES["single_label"].model / "model.safetensors")
        moved = {key for key in before if not found.weights[key].equal(before[key])}
        opened = {key for key in before if factor_at(key, 5) > 0}
        assert moved <= opened, name
        assert {key for key in opened - moved if not key.endswith("key.bias")} == set(), name


def test_the_tolerance_sees_a_missing_warm_up(train: Run) -> None:
    with_warmup = train("single_label", SGD, WHOLE, 20, trainable=GRADUAL)
    without = train(
        "single_label", SGD, WHOLE, 20, trainable={**GRADUAL, "unfreeze": {"every": 4, "warmup_steps": 0}}
    )
    pairs = zip(without.curve("loss"), with_warmup.curve("loss"), strict=True)
    assert max(apart(a, b) for a, b in pairs) > 100 * TOLERANCE


def test_frozen_from_the_start_holds_nothing(train: Run, workshop: Path) -> None:
    found = train("single_label", ADAMW, WHOLE, 4, trainable={"freeze": ["backbone"]})
    assert found.facts["trainable_parameters"] == found.weights["classifier.weight"].numel() + 4
    before = load_file(workshop / "models" / CASES["single_label"].model / "model.safetensors")
    moved = {key for key in before if not found.weights[key].equal(before[key])}
    assert moved == {"classifier.weight", "classifier.bias"}
