"""The gradient's norm against fp64, and the clip coefficient against torch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tunesmith import gradients
from tunesmith.gradients import clip_coefficient, local_square_sum


def exact(grads: Sequence[Tensor]) -> float:
    return math.sqrt(math.fsum(grad.double().square().sum().item() for grad in grads))


def relative_error(grads: Sequence[Tensor]) -> float:
    return abs(local_square_sum(grads).sqrt().item() / exact(grads) - 1.0)


SHAPES = [(3000, 384), (384, 384), (384,), (1,), (), (511,), (512,), (513,), (7, 3, 5)]


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "equal", "heavy"])
def test_the_norm_is_within_2e_7_of_fp64(kind: str, dtype: torch.dtype) -> None:
    """Equal elements are the worst case of a running sum: torch's own norm is 5e-3 off there, and rows of
    16,384 1e-5."""
    make = {
        "normal": lambda shape: normal(shape),
        "equal": lambda shape: torch.full(shape, 0.37),
        "heavy": lambda shape: normal(shape).pow(5),
    }[kind]
    grads = [make(shape).to(dtype) for shape in SHAPES]
    total = local_square_sum(grads)
    assert total.dtype == torch.float64
    assert total.shape == ()
    assert relative_error(grads) < (2.5e-7 if dtype != torch.float64 else 1e-14)


def test_every_element_counts_once() -> None:
    """Small whole numbers have exact sums."""
    for size in (1, 511, 512, 513, 1024, (1 << 20) - 1, 1 << 20, (1 << 20) + 513):
        assert local_square_sum([torch.full((size,), 2.0)]).item() == pytest.approx(4.0 * size, rel=1e-6)
        marked = torch.zeros(size)
        marked[-1] = 3.0
        marked[0] = 4.0
        assert local_square_sum([marked]).item() == (25.0 if size > 1 else 16.0)


def test_the_sum_over_shards_is_the_sum_over_the_whole() -> None:
    whole = normal((100_003,))
    shards = sum(local_square_sum([part]) for part in whole.split(33_333))
    assert float(shards) == pytest.approx(local_square_sum([whole]).item(), rel=4e-7)


@pytest.mark.parametrize(
    "view",
    [
        lambda g: g.t(),
        lambda g: g[:, ::2],
        lambda g: g[:1].expand(50, -1),
        lambda g: g.view(30, 40, 5, 10).to(memory_format=torch.channels_last),
        lambda g: g.permute(1, 0).unsqueeze(1),
    ],
    ids=["transposed", "strided", "expanded", "channels_last", "permuted"],
)
def test_non_contiguous_gradients(view: Callable[[Tensor], Tensor]) -> None:
    grad = view(normal((300, 200)))
    assert relative_error([grad]) < 2e-7


def test_none_and_empty_gradients_count_nothing() -> None:
    grad = normal((10, 10))
    total = local_square_sum([None, torch.empty(0), grad, torch.empty(3, 0), None])
    assert total.item() == local_square_sum([grad]).item()
    for nothing in ([], [None], [torch.empty(0)]):
        total = local_square_sum(nothing)
        assert total.item() == 0.0
        assert (total.dtype, total.shape) == (torch.float64, torch.Size([]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 600, -1])
def test_non_finite_elements_come_through(bad: float, where: int) -> None:
    grad = torch.ones(1300)
    grad[where] = bad
    assert not math.isfinite(local_square_sum([torch.ones(5), grad]).item())


def test_the_gradients_are_left_alone_and_no_graph_is_kept() -> None:
    grad = normal((40, 40)).requires_grad_()
    before = grad.detach().clone()
    assert not local_square_sum([grad]).requires_grad
    assert torch.equal(grad, before)


def test_the_accelerators_way_is_the_same_norm() -> None:
    """Whole tensors at once; on the CPU it runs, with less accurate sums."""
    grads = [normal((100, 30)), normal((77,)).bfloat16(), normal((5, 5)).double()]
    norms = torch.cat([part.double() for part in gradients._tensor_norms(grads)])  # pyright: ignore[reportPrivateUsage]
    assert norms.numel() == 3
    assert norms.square().sum().item() == pytest.approx(local_square_sum(grads).item(), rel=1e-5)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 5.0, 100.0])
def test_clipping_is_torchs(max_norm: float) -> None:
    grads = [normal((30, 20)), normal((20,), 1)]
    parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    coefficient = clip_coefficient(local_square_sum(grads).sqrt(), max_norm)
    for parameter, grad in zip(parameters, grads, strict=True):
        torch.testing.assert_close(grad * coefficient, parameter.grad, rtol=1e-6, atol=0.0)


def test_the_coefficients_formula_and_dtype() -> None:
    coefficient = clip_coefficient(torch.tensor(3e-6, dtype=torch.float64), 1e-6)
    assert coefficient.dtype == torch.float32
    assert coefficient.shape == ()
    assert coefficient.item() == pytest.approx(0.25, rel=1e-6)
    assert clip_coefficient(torch.tensor(0.0), 1.0).item() == 1.0
    assert clip_coefficient(torch.tensor(0.5), 1.0).item() == 1.0
    unclipped = clip_coefficient(torch.tensor(1e9, dtype=torch.float64), None)
    assert (unclipped.item(), unclipped.dtype) == (1.0, torch.float32)


def test_the_coefficient_of_a_non_finite_norm() -> None:
    assert math.isnan(clip_coefficient(torch.tensor(math.nan), 1.0).item())
    assert clip_coefficient(torch.tensor(math.inf), 1.0).item() == 0.0
