"""Penalties that hold weights near where they began, the Fisher information, WiSE-FT: by hand in plain torch, and alike
on every engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from torch import Tensor

from objective_cases import (
    ACCUMULATED,
    ADAMW,
    CASES,
    SGD,
    SHARDED,
    TWO,
    WHOLE,
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
from tunesmith.run import Resume

ENGINES = {"ddp": {"strategy": "ddp"}, **SHARDED}
STEPS = 12
HELD: dict[str, dict[str, Any]] = {
    "l2_sp": {"l2_sp": {"weight": 0.5}},
    "anchor": {"anchor": {"weight": 0.8, "factor": 0.5}},
    "ewc": {"ewc": {"weight": 30.0, "rows": 12, "labels": "data"}},
}


def anchor_strength(name: str) -> float:
    if "embeddings" in name:
        return 0.8
    return next((0.8 * 0.5 ** (i + 1) for i in (0, 1) if f"encoder.layer.{i}." in name), 0.0)


def empirical_fisher(model: Any, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Mean of squared gradients of −log p(label), row by row, in fp64."""
    model = model.double().eval()
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        model.zero_grad()
        PLAIN["single_label"].loss(model, [row]).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            found[name] += p.grad.square() / len(rows)
    return found


@pytest.fixture
def old_rows(workshop: Path) -> dict[str, Any]:
    """The recipe's own rows as the old ones: 12 of them are drawn."""
    path = str(workshop / "data" / "single.jsonl")
    return {"data": [{"path": path, "format": "classification", "limit": 12}]}


def settings(name: str, old_rows: dict[str, Any]) -> dict[str, Any]:
    held = HELD[name]
    return {"ewc": {**held["ewc"], **old_rows}} if name == "ewc" else held


def strengths(name: str, workshop: Path) -> Callable[[str], float | Tensor]:
    if name == "l2_sp":
        return lambda _: 0.5
    if name == "anchor":
        return anchor_strength
    case = CASES["single_label"]
    rows = first_rows(workshop, 12)
    found = empirical_fisher(plain_model(workshop, case), rows)
    return lambda parameter: 0.0 if "classifier" in parameter else 30.0 * found[parameter].float()


def first_rows(workshop: Path, count: int) -> list[dict[str, Any]]:
    from objective_cases import open_stream

    stream = open_stream(recipe(workshop, CASES["single_label"], SGD, WHOLE, 1), workshop)
    return [stream.dataset.table.row(row) for row in range(count)]


@pytest.mark.parametrize("name", HELD)
def test_a_penalty_by_hand(train: Run, workshop: Path, old_rows: dict[str, Any], name: str) -> None:
    case = CASES["single_label"]
    found = train("single_label", SGD, WHOLE, STEPS, remember=settings(name, old_rows))
    strength = strengths(name, workshop)
    rows = open_rows(recipe(workshop, case, SGD, WHOLE, STEPS), workshop)
    model = plain_model(workshop, case)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses: list[float] = []
    norms: list[float] = []
    penalties: list[float] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = PLAIN["single_label"].loss(model, rows(step))
        held = [(strength(n) * (p - start[n]).square()).sum() / 2 for n, p in model.named_parameters()]
        penalty = torch.stack(held).sum()
        (loss + penalty).backward()
        norms.append(
            float(torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt())
        )
        optimizer.step()
        losses.append(loss.item())
        penalties.append(penalty.item())
    assert penalties[-1] > 1e-5
    for key, expected in (("loss", losses), ("grad_norm", norms)):
        worst = max(apart(a, b) for a, b in zip(found.curve(key), expected, strict=True))
        assert worst < 2e-6, f"{key} differs by {worst:.1e}"
    shown = found.curve(f"penalty/{name}")
    assert shown[0] == 0.0
    assert max(apart(a, b) for a, b in zip(shown[1:], penalties[1:], strict=True)) < 1e-4
    expected_weights = {n: model.state_dict()[n] for n in found.weights}
    assert max(weights_apart(found.weights, expected_weights).values()) < 1e-6


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("strategy", ["accumulated", *ENGINES])
def test_it_is_the_same_everywhere(train: Run, old_rows: dict[str, Any], strategy: str, name: str) -> None:
    held = settings(name, old_rows)
    one = train("single_label", SGD, WHOLE, STEPS, remember=held)
    if strategy == "accumulated":
        other = train("single_label", SGD, ACCUMULATED, STEPS, remember=held)
    else:
        other = train("single_label", SGD, TWO, STEPS, remember=held, parallel=ENGINES[strategy])
    assert_same_curves(other, one)
    assert_same_weights(other, one)
    pairs = zip(other.curve(f"penalty/{name}")[1:], one.curve(f"penalty/{name}")[1:], strict=True)
    assert max(apart(a, b) for a, b in pairs) < 1e-4


@pytest.mark.parametrize("strategy", ["zero2", "fsdp2"])
def test_a_resumed_run_ends_with_the_same_bits(
    workshop: Path, pools: Pools, tmp_path: Path, old_rows: dict[str, Any], strategy: str
) -> None:
    held = {**HELD["l2_sp"], **settings("ewc", old_rows), "wise_ft": {"alpha": 0.7}}
    made = recipe(
        workshop, CASES["single_label"], ADAMW, TWO, 6, remember=held, parallel=ENGINES[strategy],
        checkpoint={"save_steps": 3, "save_total_limit": None, "final": "last"},
    )  # fmt: skip
    made = made.model_copy(update={"run_name": f"remember-{strategy}"})
    pools[2].run(made, workshop)
    whole = workshop / "runs" / made.run_name
    interrupted(whole, tmp_path / made.run_name, 3)
    again = made.model_copy(update={"output_dir": str(tmp_path)})
    pools[2].run(again, workshop, Resume(resume=True))
    expected = load_file(whole / "final" / "model.safetensors")
    found = load_file(tmp_path / made.run_name / "final" / "model.safetensors")
    assert all(found[name].equal(expected[name]) for name in expected)


def test_new_weights_are_held_near_zero(train: Run, workshop: Path) -> None:
    """The classifier of a model that had none has no start to go back to."""
    model = {"model_name_or_path": str(workshop / "models" / "bert_mlm")}
    held = {"l2_sp": {"weight": 1e6, "new_weight": 0.5}}
    slow = {**SGD, "optim": {**SGD["optim"], "learning_rate": 1e-7}}
    found = train("single_label", slow, WHOLE, 2, model=model, remember=held)
    new = [name for name in found.facts["new_weights"] if "classifier" in name]
    assert new
    # the penalty of the first step is that of the new weights alone: what came from the files is where it began
    squares = sum(float(found.weights[name].double().square().sum()) for name in found.facts["new_weights"])
    assert found.curve("penalty/l2_sp")[0] == pytest.approx(0.25 * squares, rel=1e-3)


def test_wise_ft_lies_between(train: Run, workshop: Path) -> None:
    plain = train("single_label", SGD, WHOLE, STEPS)
    between = train("single_label", SGD, WHOLE, STEPS, remember={"wise_ft": {"alpha": 0.25}})
    assert between.curve("loss") == plain.curve("loss")
    start = plain_model(workshop, CASES["single_label"]).state_dict()
    for name, value in between.weights.items():
        expected = 0.75 * start[name].double() + 0.25 * plain.weights[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


def test_wise_ft_lies_between_the_beginning_and_the_average(train: Run, workshop: Path) -> None:
    """Where `final/` has the average of the weights, that is what is mixed with what the run began with."""
    ema = {"averaging": {"type": "ema", "decay": 0.8, "warmup": False}}
    average = train("single_label", SGD, WHOLE, STEPS, **ema)
    between = train("single_label", SGD, WHOLE, STEPS, remember={"wise_ft": {"alpha": 0.25}}, **ema)
    start = plain_model(workshop, CASES["single_label"]).state_dict()
    for name, value in between.weights.items():
        expected = 0.75 * start[name].double() + 0.25 * average.weights[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


def test_another_seed_draws_other_rows(train: Run, old_rows: dict[str, Any]) -> None:
    """Also where the information of the first seed lies on disk."""
    rows = [{**old_rows["data"][0], "limit": 24}]
    asked = {"weight": 30.0, "rows": 6, "labels": "data", "data": rows}
    one = train("single_label", SGD, WHOLE, 4, remember={"ewc": asked, "seed": 0})
    other = train("single_label", SGD, WHOLE, 4, remember={"ewc": asked, "seed": 1})
    assert one.curve("penalty/ewc")[1:] != other.curve("penalty/ewc")[1:]


def test_answers_are_drawn_from_what_the_model_predicts() -> None:
    """Over many draws, the labels have the probabilities that the model gives them; where there is no label there
    stays none."""
    from tunesmith.batch import IGNORED, Batch
    from tunesmith.remember.fisher import answered

    class Tokens:
        terms = ()

    logits = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [1.0, 1.0, 1.0]]])
    labels = torch.tensor([[0, 0, IGNORED]])
    batch = Batch({}, {"labels": labels}, (0,), 3)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack(
        [answered(Tokens(), {"logits": logits}, batch, generator).targets["labels"] for _ in range(4000)]  # type: ignore[arg-type]
    )
    assert (drawn[..., 2] == IGNORED).all()
    for place in (0, 1):
        shares = F.one_hot(drawn[:, 0, place], 3).double().mean(0)
        torch.testing.assert_close(shares, logits[0, place].double().softmax(-1), atol=0.03, rtol=0)
