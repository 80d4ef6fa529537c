"""Linear cross-entropy under torch.compile, on fake and meta tensors, under torch.library's own check, and in DDP's
kind of module; and what it refuses, by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from head_cases import case, fused
from tunesmith_kernels import linear_cross_entropy
from tunesmith_kernels.linear_loss import cross_entropy

# torch's own, from within torch.compile
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("compiler", "backend"),
    [("aot_eager", None), ("aot_eager", "torch"), ("aot_eager", "reference"), ("inductor", None)],
)
@pytest.mark.parametrize("options", ["plain", "each", "stats", "autocast", "frozen head"])
def test_compiles_without_a_graph_break(options: str, backend: str | None, compiler: str) -> None:
    """Forward and backward around the op, too; results as without."""
    made = case(60, 24, 103, ignored=0.2)
    given = {"reduction": "none"} if options == "each" else {"normalizer": torch.tensor(48.0), "z_loss": 1e-3}

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=options == "autocast"):
            found = linear_cross_entropy(
                torch.tanh(hidden),
                weight,
                target,
                bias=bias,
                backend=backend,
                return_stats=options == "stats",
                **given,
            )
        loss, stats = found if options == "stats" else (found, ())
        return (loss * 1.5).sum(), *stats

    def run(function: Any) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (made.hidden, made.weight, made.bias)]
        leaves[1].requires_grad_(options != "frozen head")
        loss, *stats = function(*leaves, made.target)
        loss.backward()
        return [loss.detach(), *stats, *(leaf.grad for leaf in leaves if leaf.requires_grad)]

    for eager, compiled in zip(
        run(step), run(torch.compile(step, fullgraph=True, backend=compiler)), strict=True
    ):
        assert eager.dtype == compiled.dtype
        tolerance = {"rtol": 0.02, "atol": 2e-3} if options == "autocast" else {}
        torch.testing.assert_close(compiled, eager, **tolerance)


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["fake", "meta"])
def test_fake_and_meta_tensors(device: str, dtype: torch.dtype, reduction: str, backend: str | None) -> None:
    """Shapes and dtypes as for real ones, forward and backward; nothing is computed."""
    made = case(6, 24, 103).given(reduction=reduction).to(dtype)
    real = fused(made, backend)
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        shapes = ((6, 24), (103, 24), (103,))
        hidden, weight, bias = (torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes)
        target = torch.empty(6, dtype=torch.int64)
        loss, stats = linear_cross_entropy(
            hidden, weight, target, bias=bias, reduction=reduction, backend=backend, return_stats=True
        )
        (loss * 2).sum().backward()
    assert (loss.shape, loss.dtype) == (real["loss"].shape, torch.float32)
    assert all(value.shape == (6,) for value in stats)
    for name, leaf in zip(("hidden", "weight", "bias"), (hidden, weight, bias), strict=True):
        assert (leaf.grad.shape, leaf.grad.dtype) == (real[name].shape, dtype)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp16", "bf16 beside fp32"])
@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (False, False, False)])
@pytest.mark.parametrize("soft", [False, True])
def test_the_operator_is_registered_properly(soft: bool, wanted: tuple[bool, ...], dtypes: str) -> None:
    """torch.library.opcheck: schema, fake implementation, aliasing, mutation."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(dtypes, torch.bfloat16)
    made = case(30, 24, 103, ignored=0.0 if soft else 0.3).to(
        dtype, torch.float32 if "beside" in dtypes else None
    )
    target = torch.softmax(torch.randn(30, 103), 1) if soft else made.target
    backend = "torch" if dtypes == "fp16" else "cpu"
    tensors = (
        made.hidden,
        made.weight,
        made.bias,
        target,
        torch.rand(103),
        torch.rand(30),
        torch.tensor(0.5),
    )
    numbers = (-100, 0.1, 1e-3, 0.0, 5.0, 1.1, backend)
    torch.library.opcheck(cross_entropy._operator, (*tensors, *numbers, *wanted))


def test_a_modules_head() -> None:
    """Parameters of a module that others wrap: gradients land in .grad, as F.linear's do."""
    head, made = torch.nn.Linear(24, 103), case(60, 24, 103)
    linear_cross_entropy(made.hidden, head.weight, made.target, bias=head.bias).backward()
    expected = [head.weight.grad.clone(), head.bias.grad.clone()]
    head.zero_grad()
    torch.nn.functional.cross_entropy(head(made.hidden), made.target, reduction="sum").backward()
    torch.testing.assert_close(expected, [head.weight.grad, head.bias.grad])
