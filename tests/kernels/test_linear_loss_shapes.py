"""The rows that are labelled are another number in every step: the products of the linear losses in 16 bits on the CPU
have few shapes all the same, since the library that computes them keeps memory for each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import distillation_cases
import head_cases
from accuracy import hold
from tunesmith_kernels.linear_loss import chunks
from tunesmith_kernels.linear_loss.distillation_chunks import (
    DistillationProblem,
    Teacher,
    compute_distillation,
)
from tunesmith_kernels.linear_loss.distillation_rows import (
    DISTILLATION_OUTPUTS,
    DistillationInputs,
    DistillationOptions,
    DistillationOutputs,
)
from tunesmith_kernels.linear_loss.rows import OUTPUTS, RowInputs, RowOptions, RowOutputs

COUNTS, VOCAB = range(1, 201), 211
LABELLED = (1, 31, 32, 33, 255)
IN_16_BITS = [(backend, dtype) for backend, dtype in head_cases.BACKENDS if dtype.itemsize == 2]
ALL = chunks.Wanted(hidden=True, weight=True, bias=True)


class _Products(TorchDispatchMode):
    """The shapes of the products' operands."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[tuple[int, ...], ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.shapes.add(tuple(tuple(arg.shape) for arg in args if isinstance(arg, Tensor)))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[256, 64], ids=["one chunk", "chunks of 64 rows"])
def most(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(chunks._CHUNK_BYTES, "cpu", 1)
    monkeypatch.setitem(chunks._MIN_ROWS, "cpu", request.param)
    return request.param


def _targets() -> Iterator[Tensor]:
    """[203], another number of which is labelled each time."""
    for count in COUNTS:
        target = torch.randint(VOCAB, (203,))
        head_cases.some_ignored(target, 203 - count)
        yield target


def _zeros(names: tuple[str, ...]) -> list[Tensor]:
    flags = ("correct", "agree")
    return [torch.zeros(203, dtype=torch.bool if name in flags else torch.float32) for name in names]


def _loss_shapes(hidden: torch.dtype, head: torch.dtype) -> int:
    """Of the products of the loss, over all COUNTS."""
    states, weight = torch.zeros(203, 5, dtype=hidden), torch.zeros(VOCAB, 5, dtype=head)
    counted: list[int] = []

    def kernel(logits: Tensor, inputs: RowInputs, options: RowOptions, outputs: RowOutputs) -> None:
        assert len(logits) == len(inputs.target) == len(outputs.loss)
        counted.append(len(logits))

    with _Products() as products:
        for target in _targets():
            problem = chunks.Problem(states, weight, None, target, None, None, -100, RowOptions())
            chunks.compute(problem, kernel, ALL, None, RowOutputs(*_zeros(OUTPUTS)))
    assert sum(counted) == sum(COUNTS), "the row kernel sees the labelled rows alone"
    return len(products.shapes)


def _distillation_shapes(student: torch.dtype, teacher: torch.dtype) -> int:
    states, weight = torch.zeros(203, 5, dtype=student), torch.zeros(VOCAB, 5, dtype=student)
    known = Teacher(torch.zeros(203, 6, dtype=teacher), torch.zeros(VOCAB, 6, dtype=teacher))
    options = DistillationOptions("forward_kl", 0.5, 1.0, 1.0, 0.5, 0.0, 1.0, 0.0, 1.0, True)
    counted: list[int] = []

    def kernel(
        logits: Tensor, inputs: DistillationInputs, options: DistillationOptions, outputs: DistillationOutputs
    ) -> None:
        assert inputs.teacher_logits is not None
        assert logits.shape == inputs.teacher_logits.shape
        assert len(logits) == len(outputs.loss)
        counted.append(len(logits))

    with _Products() as products:
        for target in _targets():
            problem = DistillationProblem(states, weight, None, known, target, None, -100, options)
            outputs = DistillationOutputs(*_zeros(DISTILLATION_OUTPUTS))
            compute_distillation(problem, kernel, ALL, None, outputs)
    assert sum(counted) == sum(COUNTS)
    return len(products.shapes)


@pytest.mark.parametrize("hidden", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [None, torch.float32], ids=["head alike", "fp32 head"])
def test_the_loss_has_few_products(hidden: torch.dtype, head: torch.dtype | None, most: int) -> None:
    """Multiples of 8, up to 200 or a chunk: of the logits, and of the gradients of hidden and weight."""
    # the gradient of the weight is written first and then added to, and each is a shape of operands
    assert _loss_shapes(hidden, head or hidden) <= 4 * min(200, most) // 8


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)],
)
def test_distillation_has_few_products(student: torch.dtype, teacher: torch.dtype, most: int) -> None:
    assert _distillation_shapes(student, teacher) <= 5 * min(200, most) // 8


def test_a_teacher_in_16_bits_beside_a_student_in_fp32() -> None:
    """Has few products, and leaves the student's as they are."""
    assert 3 * 200 < _distillation_shapes(torch.float32, torch.bfloat16) <= 3 * 200 + 200 // 8


def test_fp32_has_a_product_of_each_number_of_rows() -> None:
    """As many as are labelled, no more: which also shows that the products are counted."""
    assert _loss_shapes(torch.float32, torch.float32) == 3 * 200
    assert _distillation_shapes(torch.float32, torch.float32) == 4 * 200


@pytest.mark.parametrize("most", [256, 512, 800, 26_000])
def test_rows_of_a_product(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is no larger than its budget, every product has at most 7 rows or 1/16 more than are asked for, and
    there are 16 numbers of rows from any power of two to the next."""
    monkeypatch.setitem(chunks._CHUNK_BYTES, "cpu", 1)
    monkeypatch.setitem(chunks._MIN_ROWS, "cpu", most)
    found: set[int] = set()
    for rows in range(1, 3 * most, 1 + most // 500):
        size = chunks.chunk_rows(rows, 2, 2, "cpu", padded=True)
        assert size <= most
        assert size == chunks.product_rows(size, torch.bfloat16, "cpu")
        last = chunks.product_rows((rows - 1) % size + 1, torch.bfloat16, "cpu")
        assert 0 <= last - ((rows - 1) % size + 1) <= max(7, rows // 16)
        found |= {size, last} if rows > size else {last}
    assert len(found) <= 16 * (1 + math.ceil(math.log2(most / 128)))


@pytest.mark.parametrize(("backend", "dtype"), IN_16_BITS)
@pytest.mark.parametrize("ignored", [0, 20])
@pytest.mark.parametrize("rows", LABELLED)
def test_the_losss_accuracy_beside_rows_of_zeros(
    rows: int, ignored: int, backend: str, dtype: torch.dtype
) -> None:
    made = head_cases.case(rows + ignored, 65, 1003).to(dtype)
    head_cases.some_ignored(made.target, ignored)
    head_cases.hold_case(made, backend)


@pytest.mark.parametrize(("backend", "dtype"), IN_16_BITS)
@pytest.mark.parametrize("ignored", [0, 20])
@pytest.mark.parametrize("rows", LABELLED)
def test_the_distillations_accuracy_beside_rows_of_zeros(
    rows: int, ignored: int, backend: str, dtype: torch.dtype
) -> None:
    made = distillation_cases.case(rows + ignored, 65, 1003).to(dtype)
    assert made.target is not None
    head_cases.some_ignored(made.target, ignored)
    # of a single row a mutant of the divergence may be within the rule by chance
    distillation_cases.hold_case(made, backend, alike=rows == 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_infinite_weights_reach_no_gradient_through_rows_of_zeros(dtype: torch.dtype) -> None:
    """0 × inf is NaN: what the zeros' own logits are is told to nobody."""
    made = head_cases.case(3, 8, 40).to(dtype)
    assert made.bias is not None
    made.weight[7, 2] = torch.inf
    made.hidden[:, 2] = -1  # this class has probability 0
    found = head_cases.fused(made, "torch")
    assert found["loss"].isfinite()
    assert found["weight"].isfinite().all()
    exact, own = (head_cases.naive(one)["bias"] for one in (made.to(torch.float64), made))
    hold(found["bias"], exact, own)
