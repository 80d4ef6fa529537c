"""Linear cross-entropy under autograd: what is frozen, asked for twice, cast, recomputed; and what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from accuracy import hold
from head_cases import Case, case, fused, naive
from tunesmith_kernels import linear_cross_entropy
from tunesmith_kernels.linear_loss import chunks, cross_entropy
from tunesmith_kernels.linear_loss.backends import row_kernel
from tunesmith_kernels.linear_loss.rows import OUTPUTS, RowOptions, RowOutputs

in_every_backend = pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
either_reduction = pytest.mark.parametrize("reduction", ["sum", "none"])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _loss(made: Case, trained: set[str], backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {"hidden": made.hidden, "weight": made.weight, "bias": made.bias}
    leaves = {name: leaf.clone().requires_grad_(name in trained) for name, leaf in leaves.items()}
    loss = linear_cross_entropy(
        leaves["hidden"], leaves["weight"], made.target, bias=leaves["bias"], **made.options, backend=backend
    )
    return loss, leaves


@in_every_backend
@either_reduction
@pytest.mark.parametrize(
    "trained", [{"hidden"}, {"weight"}, {"bias"}, {"hidden", "bias"}, {"weight", "bias"}]
)
def test_only_what_is_trained(trained: set[str], reduction: str, backend: str) -> None:
    """A frozen head's gradient is not computed; a trainable head's is not lost with frozen hidden states."""
    made = case(50, 24, 103, ignored=0.2).given(reduction=reduction)
    whole = fused(made, backend)
    loss, leaves = _loss(made, trained, backend)
    loss.backward(torch.ones_like(loss))
    for name, leaf in leaves.items():
        if name in trained:
            torch.testing.assert_close(leaf.grad, whole[name], rtol=0, atol=0)
            assert leaf.grad.any()
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("trained", [{"hidden"}, {"weight"}, {"bias"}])
def test_a_frozen_tensors_gradient_is_not_computed(
    trained: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[chunks.Wanted] = []
    compute = cross_entropy.compute

    def spy(problem: Any, kernel: Any, wanted: chunks.Wanted, *rest: Any) -> chunks.Gradients:
        asked.append(wanted)
        found = compute(problem, kernel, wanted, *rest)
        for name in ("hidden", "weight", "bias"):
            assert bool(getattr(found, name).numel()) == getattr(wanted, name)
        return found

    monkeypatch.setattr(cross_entropy, "compute", spy)
    _loss(case(50, 24, 103), trained, "cpu")[0].backward()
    assert asked == [chunks.Wanted(**{name: name in trained for name in ("hidden", "weight", "bias")})]
    with torch.no_grad():
        loss, _ = _loss(case(50, 24, 103), trained, "cpu")
    assert not loss.requires_grad
    assert asked[1:] == [chunks.Wanted(hidden=False, weight=False, bias=False)]


@in_every_backend
def test_loss_without_gradient_is_the_same(backend: str) -> None:
    made = case(50, 24, 103, ignored=0.2)
    assert torch.equal(_loss(made, set(), backend)[0], _loss(made, {"hidden", "weight"}, backend)[0].detach())


@in_every_backend
@either_reduction
@pytest.mark.parametrize("upstream", [1.0, -2.5])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_second_backward_raises_or_is_right(
    hooked: bool, upstream: float, reduction: str, backend: str
) -> None:
    """With hooks that hold the saved tensors, too: torch does not count who wrote to those."""
    made = case(50, 24, 103).given(reduction=reduction)
    once = fused(replace(made, upstream=upstream), backend)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    with hooks if hooked else torch.enable_grad():
        loss, leaves = _loss(made, {"hidden", "weight", "bias"}, backend)
    loss.backward(torch.full_like(loss, upstream), retain_graph=True)
    first = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    try:
        loss.backward(torch.full_like(loss, upstream))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error) or "a second backward" in str(error)  # noqa: PT017
        second = first
        assert upstream != 1.0
        assert backend != "reference"
    else:
        second = {name: leaf.grad / 2 for name, leaf in leaves.items()}
    for name in leaves:
        torch.testing.assert_close(first[name], once[name], rtol=0, atol=0)
        torch.testing.assert_close(second[name], once[name])


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@either_reduction
def test_double_backward_raises(reduction: str, backend: str) -> None:
    loss, leaves = _loss(case(50, 24, 103).given(reduction=reduction), {"hidden"}, backend)
    (gradient,) = torch.autograd.grad(loss.sum() * 2, leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient.square().sum() + leaves["hidden"].sum()).backward()  # a gradient penalty


@in_every_backend
@either_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_callers_tensors_are_not_written_to(dtype: torch.dtype, reduction: str, backend: str) -> None:
    options = {
        "class_weight": torch.rand(103),
        "token_weight": torch.rand(50),
        "normalizer": torch.tensor(3.0),
    }
    made = case(50, 24, 103, ignored=0.2).given(reduction=reduction, **options).to(dtype)
    soft = replace(made, target=torch.softmax(torch.randn(50, 103), 1))
    for given in (made, soft):
        tensors = [given.hidden, given.weight, given.bias, given.target, *options.values()]
        before = [(tensor.clone(), tensor._version) for tensor in tensors]
        fused(replace(given, upstream=-2.5), backend)
        for tensor, (values, version) in zip(tensors, before, strict=True):
            assert torch.equal(tensor, values)
            assert tensor._version == version


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_the_threads(dtype: torch.dtype) -> None:
    """What the C++ kernel writes, bit for bit; the products are torch's."""
    made = case(300, 24, 1003, ignored=0.2).given(softcap=5.0, label_smoothing=0.1).to(dtype)
    logits = made.hidden @ made.weight.t()
    results: list[list[Tensor]] = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        out = RowOutputs(
            *(torch.empty(300, dtype=torch.bool if name == "correct" else torch.float32) for name in OUTPUTS)
        )
        gradient = logits.clone()
        inputs = chunks.RowInputs(made.target.clamp_min(0), None, None, torch.ones(300))
        row_kernel("cpu")(gradient, inputs, RowOptions(label_smoothing=0.1, softcap=5.0), out)
        results.append([gradient, *(getattr(out, name) for name in OUTPUTS)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@in_every_backend
def test_calls_repeat_bit_for_bit(backend: str) -> None:
    made = case(300, 24, 1003, ignored=0.2)
    first, second = fused(made, backend), fused(made, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@in_every_backend
def test_gradients_accumulate(backend: str) -> None:
    """Into .grad that is there, and a first one that later ones must not write through to the saved tensors."""
    made = case(50, 24, 103)
    leaf = made.weight.clone().requires_grad_()
    for step in range(1, 4):
        linear_cross_entropy(made.hidden, leaf, made.target, backend=backend).backward()
        torch.testing.assert_close(leaf.grad, step * fused(replace(made, bias=None), backend)["weight"])


@in_every_backend
@either_reduction
def test_autocast(reduction: str, backend: str) -> None:
    """fp32 parameters: the product in bf16, the gradients in fp32; as F.linear, or nearer."""
    made = case(200, 24, 103, ignored=0.2).given(reduction=reduction)
    rounded = made.to(torch.bfloat16).to(torch.float64)
    exact = naive(rounded)
    with torch.autocast("cpu", torch.bfloat16):
        found = fused(made, backend)
    own = naive(made.to(torch.bfloat16))
    for name, value in found.items():
        assert value.dtype == torch.float32
        # the gradient of bf16 hidden states is bf16, and so is F.linear's of its weight
        hold(value.bfloat16() if name == "hidden" else value, exact[name], own[name], name)


@in_every_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(reentrant: bool, backend: str) -> None:
    made = case(50, 24, 103)
    expected = fused(replace(made, upstream=0.5), backend)
    leaves = {name: getattr(made, name).clone().requires_grad_() for name in ("hidden", "weight", "bias")}

    def head(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, made.target, bias=bias, backend=backend)

    loss = checkpoint(head, *leaves.values(), use_reentrant=reentrant)
    (loss / 2).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[name], rtol=0, atol=0)


class _Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return found


@pytest.mark.parametrize(("rows", "vocab"), [(2048, 50_304), (2048, 2000)])
def test_the_whole_logits_never_exist(rows: int, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of the forward is a chunk's logits or the head's gradient."""
    monkeypatch.setitem(chunks._CHUNK_BYTES, "cpu", 4_000_000)
    made = case(rows, 16, vocab, ignored=0.1, bias=False)
    problem = chunks.Problem(made.hidden, made.weight, None, made.target, None, None, -100, RowOptions())
    outputs = RowOutputs(
        *(torch.zeros(rows, dtype=torch.bool if name == "correct" else torch.float32) for name in OUTPUTS)
    )
    with _Largest() as largest:
        chunks.compute(
            problem, row_kernel("cpu"), chunks.Wanted(hidden=True, weight=True, bias=False), None, outputs
        )
    chunk = chunks.chunk_rows(int((made.target != -100).sum()), vocab, 4, "cpu")
    assert chunk <= rows // 4
    assert 0 < largest.elements <= max(chunk * vocab, vocab * 16)
