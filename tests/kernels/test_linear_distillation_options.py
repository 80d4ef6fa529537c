"""Linear distillation's options in every backend; its statistics; autograd, torch.compile; what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from accuracy import hold
from distillation_cases import BACKENDS, DIVERGENCES, TEACHERS, case, distilled, hold_case, naive, owns
from tunesmith_kernels.linear_loss.distillation import (
    DistillationStats,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    linear_distillation,
)

in_every_backend = pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
by_every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
from_every_teacher = pytest.mark.parametrize("teacher", TEACHERS)
CHUNKED = ["torch", "cpu"]


@in_every_backend
@by_every_divergence
@from_every_teacher
def test_all_options(teacher: str, divergence: dict[str, Any], backend: str, dtype: torch.dtype) -> None:
    made = case(400, 40, 203, teacher=teacher, ignored=0.2, temperature=2.0, **divergence)
    made = made.given(
        softcap=2.0,
        scale=1.5,
        token_weight=torch.rand(400, generator=torch.Generator().manual_seed(3)) - 0.2,
        normalizer=torch.tensor(41.5),
    )
    if isinstance(made.teacher, TeacherHidden):
        made = replace(made, teacher=replace(made.teacher, softcap=4.0, scale=-1.3))
    made = made.to(dtype)
    hold_case(made, backend)
    exact = naive(made.to(torch.float64))
    own, found = owns(made, exact), distilled(made, backend)
    neutral = {"softcap": None, "scale": 1.0, "token_weight": None, "normalizer": None, "temperature": 1.0}
    for option, value in neutral.items():
        without = naive(made.to(torch.float64).given(**{option: value}))
        for name in ("hidden", "weight"):
            hold(found[name], exact[name], own[name], option, dropped=without[name].to(dtype))


@in_every_backend
@from_every_teacher
def test_padding_of_either_vocabulary_is_left_out(teacher: str, backend: str, dtype: torch.dtype) -> None:
    """The student's head has classes that the teacher's has not, and the other way about: none of them counts."""
    made = case(100, 40, 103, teacher=teacher)
    padded = replace(made.teacher, vocab=100)
    if isinstance(made.teacher, TeacherTopK):
        inside = made.teacher.indices.clamp_max(99)
        spread = torch.arange(inside.shape[1]) + torch.zeros_like(inside)
        padded = replace(
            padded, indices=torch.where((made.teacher.indices > 99).any(1)[:, None], spread, inside)
        )
    elif isinstance(made.teacher, TeacherHidden):
        longer = torch.cat([made.teacher.weight, 9 * torch.ones(9, made.teacher.weight.shape[1])])
        padded = replace(
            padded,
            weight=longer,
            bias=torch.full((112,), 20.0).index_copy(0, torch.arange(103), made.teacher.bias),
        )
    else:
        padded = replace(padded, logits=torch.cat([made.teacher.logits, torch.full((100, 9), 20.0)], dim=1))
    assert made.target is not None
    made = replace(made, teacher=padded, target=made.target.clamp_max(99)).to(dtype)
    hold_case(made, backend)
    found = distilled(made, backend)
    assert found["weight"].shape == (103, 40)
    assert not found["weight"][100:].any()
    assert not found["bias"][100:].any()


@pytest.mark.parametrize("backend", ["reference", *CHUNKED])
@by_every_divergence
def test_a_class_masked_in_both_adds_nothing(divergence: dict[str, Any], backend: str) -> None:
    made = case(50, 40, 103, **divergence)
    assert made.bias is not None
    assert made.target is not None
    bias = made.bias.index_fill(0, torch.arange(90, 103), -torch.inf)
    assert isinstance(made.teacher, TeacherHidden)
    masked = replace(
        made, bias=bias, teacher=replace(made.teacher, bias=bias), target=made.target.clamp_max(89)
    )
    short = replace(masked, teacher=replace(made.teacher, vocab=90))
    found, expected = distilled(masked, backend), distilled(short, backend)
    for name in ("loss", "hidden", "weight"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *CHUNKED])
@by_every_divergence
@from_every_teacher
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_nan_is_not_lost(who: str, teacher: str, divergence: dict[str, Any], backend: str) -> None:
    made = case(6, 24, 103, teacher=teacher, reduction="none", **divergence)
    tensor = (
        made.hidden
        if who == "student"
        else next(
            value
            for value in vars(made.teacher).values()
            if isinstance(value, Tensor) and value.is_floating_point()
        )
    )
    tensor[2, 0] = torch.nan
    loss = distilled(made, backend)["loss"]
    assert loss.isnan().tolist() == [False, False, True, False, False, False]


@in_every_backend
@from_every_teacher
def test_statistics(teacher: str, backend: str, dtype: torch.dtype) -> None:
    made = case(120, 40, 53, teacher=teacher, ignored=0.2, temperature=2.0, bias=False).to(dtype)
    assert made.target is not None
    shape = (10, 12)
    moved = {
        name: value.reshape(*shape, -1)
        for name, value in vars(made.teacher).items()
        if isinstance(value, Tensor) and name != "weight"
    }
    loss, stats = linear_distillation(
        made.hidden.reshape(*shape, -1),
        made.weight,
        made.target.reshape(shape),
        teacher=replace(made.teacher, **moved),
        **made.options,
        backend=backend,
        return_stats=True,
    )
    assert isinstance(stats, DistillationStats)
    counted = made.target != -100
    assert stats.counted.flatten().equal(counted)
    assert all(value.shape == shape and not value.requires_grad for value in stats)
    assert not any(value.flatten()[~counted].any() for value in stats)
    for name, value in stats._asdict().items():
        assert value.dtype == (torch.bool if name in ("agree", "counted") else torch.float32)
    torch.testing.assert_close((0.9 * stats.kd + 0.3 * stats.ce).sum(), loss, rtol=1e-5, atol=1e-5)
    logits = torch.nn.functional.linear(made.hidden, made.weight).float()
    log_s = torch.log_softmax(logits, 1)
    loose = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(
        stats.log_prob.flatten()[counted],
        log_s.gather(1, made.target.where(counted, 0)[:, None])[:, 0][counted],
        **loose,
    )
    torch.testing.assert_close(
        stats.entropy.flatten()[counted], -(log_s.exp() * log_s).sum(1)[counted], **loose
    )
    if isinstance(made.teacher, TeacherTopK):
        likeliest = made.teacher.indices[:, 0]
    elif isinstance(made.teacher, TeacherLogits):
        likeliest = made.teacher.logits.argmax(1)
    else:
        likeliest = torch.nn.functional.linear(made.teacher.hidden, made.teacher.weight).argmax(1)
    ours = (logits.argmax(1) == likeliest)[counted]
    assert (stats.agree.flatten()[counted] == ours).float().mean() > (
        0.99 if dtype == torch.float32 else 0.95
    )


@pytest.mark.parametrize("backend", ["reference", *CHUNKED])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_tensors_get_no_gradient_and_the_others_theirs(
    frozen: str, reduction: str, backend: str
) -> None:
    made = case(60, 40, 103, reduction=reduction)
    leaves = {"hidden": made.hidden, "weight": made.weight, "bias": made.bias}
    for name, tensor in leaves.items():
        assert tensor is not None
        tensor.requires_grad_(name != frozen)
    loss = linear_distillation(
        made.hidden,
        made.weight,
        made.target,
        bias=made.bias,
        teacher=made.teacher,
        **made.options,
        backend=backend,
    )
    loss.sum().backward()
    for tensor in leaves.values():
        assert tensor is not None
        assert (tensor.grad is not None) == tensor.requires_grad
        tensor.requires_grad_(False)
    grads = {name: tensor.grad for name, tensor in leaves.items() if tensor is not None}
    whole = distilled(made, backend, torch.ones(60) if reduction == "none" else None)
    for name, grad in grads.items():
        if grad is not None:
            torch.testing.assert_close(grad, whole[name])


@pytest.mark.parametrize("backend", CHUNKED)
def test_double_backward_raises(backend: str) -> None:
    made = case(20, 24, 53)
    hidden = made.hidden.requires_grad_()
    loss = linear_distillation(hidden, made.weight, teacher=made.teacher, backend=backend)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", CHUNKED)
def test_a_second_backward_raises_or_is_right(backend: str) -> None:
    made = case(20, 24, 53)
    hidden = made.hidden.requires_grad_()
    loss = linear_distillation(hidden, made.weight, teacher=made.teacher, backend=backend)
    (first,) = torch.autograd.grad(loss, hidden, 3 * torch.ones(()), retain_graph=True)
    first = first.clone()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, hidden, 3 * torch.ones(()))


@from_every_teacher
@by_every_divergence
def test_results_do_not_depend_on_the_number_of_threads(teacher: str, divergence: dict[str, Any]) -> None:
    """The rows' losses, bitwise."""
    made = case(70, 24, 1003, teacher=teacher, reduction="none", **divergence)
    if isinstance(made.teacher, TeacherHidden):  # whose product is not ours
        logits = torch.nn.functional.linear(made.teacher.hidden, made.teacher.weight, made.teacher.bias)
        made = replace(made, teacher=TeacherLogits(logits))
    made = replace(made, hidden=made.hidden[:, :1], weight=made.weight[:, :1], bias=None)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(distilled(made, "cpu")["loss"])
    finally:
        torch.set_num_threads(threads)
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


@pytest.mark.parametrize("backend", CHUNKED)
@from_every_teacher
def test_nothing_of_the_callers_is_written_to(teacher: str, backend: str) -> None:
    made = case(40, 24, 103, teacher=teacher, token_weight=torch.rand(40), normalizer=torch.tensor(3.0))
    tensors = [
        value
        for value in (*vars(made).values(), *vars(made.teacher).values(), *made.options.values())
        if isinstance(value, Tensor)
    ]
    before = [tensor.clone() for tensor in tensors]
    distilled(made, backend)
    assert all(tensor.equal(old) for tensor, old in zip(tensors, before, strict=True))


# torch's own warnings, from within torch.compile
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["sum", "none"])
@from_every_teacher
def test_compiles_without_a_graph_break(teacher: str, reduction: str) -> None:
    made = case(40, 24, 103, teacher=teacher, ignored=0.2, reduction=reduction, temperature=2.0)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_distillation(
            hidden, weight, made.target, teacher=made.teacher, **made.options, backend="torch"
        ).sum()

    torch.compiler.reset()
    compiled: Any = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = made.hidden.requires_grad_(), made.weight.requires_grad_()
    expected, found = loss(*leaves), compiled(*leaves)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_operator_passes_torchs_own_checks() -> None:
    made = case(12, 8, 23)
    assert isinstance(made.teacher, TeacherHidden)
    numbers = (-100, "jsd", 0.3, 2.0, 1.0, 0.5, 0.0, 1.0, 0.0, 1.0, False, "torch")
    teacher = made.teacher.hidden, made.teacher.weight, made.teacher.bias, None, None, None
    torch.library.opcheck(
        torch.ops.tunesmith.linear_distillation.default,
        (made.hidden, made.weight, made.bias, *teacher, made.target, None, None, *numbers, True, True, True),
    )


def test_meta_tensors_pass() -> None:
    hidden = torch.empty(3, 4, 8, device="meta", requires_grad=True)
    weight = torch.empty(23, 8, device="meta", requires_grad=True)
    teacher = TeacherHidden(torch.empty(3, 4, 5, device="meta"), torch.empty(23, 5, device="meta"))
    loss = linear_distillation(hidden, weight, teacher=teacher)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape


def test_under_autocast_the_products_are_bf16() -> None:
    made = case(60, 40, 103, ignored=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distilled(made, "cpu")
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(found, torch.float32)
    exact = distilled(made.to(torch.bfloat16), "cpu")
    torch.testing.assert_close(found["loss"], exact["loss"], rtol=1e-6, atol=1e-6)


HIDDEN, WEIGHT = torch.zeros(4, 8), torch.zeros(11, 8)
TEACHER = TeacherHidden(torch.zeros(4, 5), torch.zeros(11, 5))
FEW = TeacherTopK(torch.arange(3).expand(4, 3), torch.full((4, 3), -2.0))
LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ce_weight": 0.5}, "ce_weight needs a target"),
        ({"target": torch.zeros(4)}, "target is int64"),
        ({"target": LABELS[:3]}, "target is int64"),
        ({"divergence": "kl"}, "divergence is one of forward_kl, reverse_kl, jsd"),
        ({"divergence": "jsd", "beta": 0.0}, "forward_kl or reverse_kl"),
        ({"divergence": "jsd", "beta": 1.0}, "forward_kl or reverse_kl"),
        ({"temperature": 0.0}, "temperature is finite and positive"),
        ({"kd_weight": -1.0}, "kd_weight is finite and not negative"),
        ({"softcap": 0.0}, "softcap is finite and positive"),
        ({"scale": 0.0}, "scale is finite and not 0"),
        ({"reduction": "mean"}, "no hidden mean"),
        ({"backend": "fast"}, "no backend 'fast'"),
        ({"teacher": replace(TEACHER, softcap=-1.0)}, "teacher.softcap is finite and positive"),
        ({"teacher": replace(TEACHER, weight=torch.zeros(12, 5))}, "give the teacher vocab"),
        (
            {"teacher": replace(TEACHER, weight=torch.zeros(9, 5), vocab=10)},
            "teacher.vocab lies between 2 and 9",
        ),
        ({"teacher": replace(TEACHER, weight=torch.zeros(11, 6))}, r"teacher.hidden is \[..., 6\]"),
        ({"teacher": replace(TEACHER, hidden=torch.zeros(3, 5))}, "beside this hidden"),
        ({"teacher": replace(TEACHER, weight=torch.zeros(11, 5).requires_grad_())}, "freeze the teacher"),
        (
            {"teacher": replace(TEACHER, weight=torch.zeros(11, 5, device="meta"))},
            "teacher.weight is on meta",
        ),
        ({"teacher": TeacherLogits(torch.zeros(4, 12))}, "give the teacher vocab"),
        ({"teacher": TeacherLogits(torch.zeros(4, 11, requires_grad=True))}, "freeze the teacher"),
        ({"teacher": TeacherLogits(torch.zeros(4, 11, dtype=torch.int64))}, "floating"),
        ({"teacher": replace(FEW, indices=FEW.indices.int())}, "teacher.indices is int64"),
        ({"teacher": replace(FEW, log_probs=torch.zeros(4, 2))}, "teacher.log_probs is floating"),
        ({"teacher": replace(FEW, log_probs=torch.ones(4, 3))}, "a log-probability is at most 0"),
        ({"teacher": replace(FEW, indices=torch.zeros(4, 3, dtype=torch.int64))}, "a class twice in a row"),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        linear_distillation(HIDDEN, WEIGHT, **{"teacher": TEACHER, "backend": "torch", **given})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["reference", *CHUNKED])
def test_what_is_no_class_raises(backend: str) -> None:
    with pytest.raises(IndexError, match="target 11 is not a class"):
        linear_distillation(HIDDEN, WEIGHT, LABELS + 11, teacher=TEACHER, backend=backend)
    with pytest.raises(IndexError, match=r"teacher\.indices has 13"):
        linear_distillation(HIDDEN, WEIGHT, teacher=replace(FEW, indices=FEW.indices + 11), backend=backend)
