"""Each kind of regularization against a plain PyTorch loop, written here without a line of ours but for the order and
the rows: two passes for SAM, rows one by one for the adversarial embeddings, torch's own SGD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from objective_cases import CASES, SGD, WHOLE, Run, apart, open_rows, recipe, weights_apart
from test_plain_loop import PLAIN, plain_model

Rows = list[dict[str, Any]]
STEPS = 6
LR = 0.05


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """What weight decay takes."""
    return [p for name, p in model.named_parameters() if p.dim() > 1 and not name.endswith("bias")]


def backward(model: nn.Module, rows: Rows) -> float:
    loss = PLAIN["single_label"].loss(model, rows)
    loss.backward()
    return loss.item()


def l1(model: nn.Module, rows: Rows) -> float:
    loss = backward(model, rows)
    sum(1e-3 * p.abs().sum() for p in matrices(model)).backward()  # pyright: ignore[reportAttributeAccessIssue]
    return loss


def l2(model: nn.Module, rows: Rows) -> float:
    loss = backward(model, rows)
    sum(1e-2 * p.square().sum() / 2 for p in model.parameters()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    return loss


def climb(model: nn.Module, step: Callable[[nn.Parameter, Tensor], Tensor]) -> Callable[[], None]:
    """Moves the parameters, and returns what brings them back."""
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p.add_(step(p, p.grad))

    @torch.no_grad()
    def back() -> None:
        for p, old in zip(model.parameters(), before, strict=True):
            p.copy_(old)

    return back


def norm(tensors: list[Tensor]) -> float:
    return torch.stack([t.detach().double().square().sum() for t in tensors]).sum().sqrt().item()


def sam(model: nn.Module, rows: Rows) -> float:
    loss = backward(model, rows)
    length = norm([p.grad for p in model.parameters() if p.grad is not None])
    back = climb(model, lambda p, grad: 0.05 * grad / length)
    model.zero_grad()
    backward(model, rows)
    back()
    return loss


def asam(model: nn.Module, rows: Rows) -> float:
    loss = backward(model, rows)
    length = norm([(p.abs() + 0.01) * p.grad for p in model.parameters() if p.grad is not None])
    back = climb(model, lambda p, grad: 0.5 * (p.abs() + 0.01).square() * grad / length)
    model.zero_grad()
    backward(model, rows)
    back()
    return loss


def one_row(model: Any, row: dict[str, Any], delta: Tensor | float) -> Tensor:
    """The loss with what is added to the row's embeddings."""
    ids, types = (torch.tensor(np.asarray(row[key])).long()[None] for key in ("input_ids", "token_type_ids"))
    embedded = model.get_input_embeddings()(ids)
    logits = model(inputs_embeds=embedded + delta, token_type_ids=types).logits
    return F.cross_entropy(logits, torch.tensor([int(row["labels"][0])]))


def slope(model: nn.Module, row: dict[str, Any], delta: Tensor) -> Tensor:
    delta = delta.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(one_row(model, row, delta), [delta])
    return gradient / gradient.norm()


def fgm(model: nn.Module, rows: Rows) -> float:
    total = torch.zeros(())
    for row in rows:
        zero = torch.zeros(1, len(row["input_ids"]), 32)
        delta = 0.5 * slope(model, row, zero)
        total = total + 0.5 * one_row(model, row, 0.0) + 0.5 * one_row(model, row, delta)
    (total / len(rows)).backward()
    return total.item() / len(rows)


def pgd(model: nn.Module, rows: Rows) -> float:
    """Two steps of 2.5 · 0.5 / 2, in a ball of 0.5."""
    total = torch.zeros(())
    for row in rows:
        delta = torch.zeros(1, len(row["input_ids"]), 32)
        total = total + 0.3 * one_row(model, row, 0.0)
        for _ in range(2):
            delta = delta + 0.625 * slope(model, row, delta)
            delta = delta * min(1.0, 0.5 / delta.norm().item())
            total = total + 0.35 * one_row(model, row, delta)
    (total / len(rows)).backward()
    return total.item() / len(rows)


HAND: dict[str, tuple[dict[str, Any], Callable[[nn.Module, Rows], float]]] = {
    "l1": ({"l1": 1e-3}, l1),
    "l2": ({"l2": {"coefficient": 1e-2, "parameters": ["all"]}}, l2),
    "sam": ({"sharpness": {"type": "sam", "rho": 0.05}}, sam),
    "asam": ({"sharpness": {"type": "asam", "rho": 0.5}}, asam),
    "fgm": ({"adversarial": {"type": "fgm", "epsilon": 0.5}}, fgm),
    "pgd": ({"adversarial": {"type": "pgd", "epsilon": 0.5, "steps": 2, "weight": 0.7}}, pgd),
    "max_norm": ({"max_norm": {"value": 0.15}}, backward),
}


@pytest.mark.parametrize("kind", HAND)
def test_it_is_what_a_loop_by_hand_does(train: Run, workshop: Path, kind: str) -> None:
    settings, gradient = HAND[kind]
    found = train("single_label", SGD, WHOLE, STEPS, regularization=settings)
    rows = open_rows(recipe(workshop, CASES["single_label"], SGD, WHOLE, STEPS), workshop)
    model = plain_model(workshop, CASES["single_label"])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses: list[float] = []
    norms: list[float] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(gradient(model, rows(step)))
        norms.append(norm([p.grad for p in model.parameters() if p.grad is not None]))
        optimizer.step()
        if kind == "max_norm":
            with torch.no_grad():
                for matrix in matrices(model):
                    matrix.copy_(torch.renorm(matrix, 2, 0, 0.15))
    for key, expected in (("loss", losses), ("grad_norm", norms)):
        worst = max(apart(a, b) for a, b in zip(found.curve(key), expected, strict=True))
        assert worst < 1e-5, f"{key} differs by {worst:.1e}"
    expected = {name: model.state_dict()[name] for name in found.weights}
    assert max(weights_apart(found.weights, expected).values()) < 1e-5
