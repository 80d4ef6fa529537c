"""Linear distillation: its loss and gradients are as near to fp64's as torch's own, in every backend and dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from accuracy import hold
from distillation_cases import (
    BACKENDS,
    DIVERGENCES,
    TEACHERS,
    case,
    distilled,
    hold_case,
    naive,
    owns,
    teacher_of,
)
from tunesmith_kernels.linear_loss import chunks
from tunesmith_kernels.linear_loss.distillation import TeacherHidden, TeacherLogits, TeacherTopK

in_every_backend = pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
by_every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
from_every_teacher = pytest.mark.parametrize("teacher", TEACHERS)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 rows."""
    monkeypatch.setitem(chunks._CHUNK_BYTES, "cpu", 1)
    monkeypatch.setitem(chunks._MIN_ROWS, "cpu", 64)


@in_every_backend
@by_every_divergence
@pytest.mark.parametrize(
    ("teacher", "temperature"),
    [
        *(("hidden", t) for t in (0.5, 1.0, 2.0, 4.0)),
        *((name, t) for name in TEACHERS[1:] for t in (1.0, 2.0)),
    ],
)
def test_divergences(
    teacher: str, temperature: float, divergence: dict[str, Any], backend: str, dtype: torch.dtype
) -> None:
    made = case(200, 65, 203, teacher=teacher, temperature=temperature, **divergence)
    hold_case(made.to(dtype), backend)


@in_every_backend
@by_every_divergence
@pytest.mark.parametrize(
    ("rows", "features", "vocab"), [(1, 1, 2), (37, 1, 1003), (1, 24, 1003), (300, 65, 7)]
)
def test_odd_shapes(
    rows: int, features: int, vocab: int, divergence: dict[str, Any], backend: str, dtype: torch.dtype
) -> None:
    # what has so few numbers may hide a mutant by chance
    made = case(rows, features, vocab, **divergence).to(dtype)
    exact = naive(made.to(torch.float64))
    own = owns(made, exact)
    for name, value in distilled(made, backend).items():
        hold(value, exact[name], own[name], f"{backend} {name}")


@in_every_backend
@by_every_divergence
@pytest.mark.parametrize(("rows", "vocab"), [(20, 50_304), (6, 128_256)])
def test_large_vocabularies(
    rows: int, vocab: int, divergence: dict[str, Any], backend: str, dtype: torch.dtype
) -> None:
    made = case(rows, 24, vocab, bias=False, temperature=2.0, **divergence).to(dtype)
    # of so few rows bf16 does not tell β from 1 − β
    hold_case(made, backend, alike="beta" in divergence and dtype == torch.bfloat16)


@in_every_backend
@from_every_teacher
@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.usefixtures("small_chunks")
def test_many_chunks(ignored: float, teacher: str, backend: str, dtype: torch.dtype) -> None:
    hold_case(case(350, 65, 203, teacher=teacher, ignored=ignored).to(dtype), backend)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@by_every_divergence
def test_chunks_change_no_rows(
    divergence: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32: what is of a row is the same in one chunk and in many."""
    made = case(100, 24, 303, reduction="none", ignored=0.2, **divergence)
    whole = distilled(made, backend)
    monkeypatch.setitem(chunks._CHUNK_BYTES, "cpu", 1)
    monkeypatch.setitem(chunks._MIN_ROWS, "cpu", 64)
    parts = distilled(made, backend)
    torch.testing.assert_close(parts["loss"], whole["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts["hidden"], whole["hidden"], rtol=1e-4, atol=1e-6)


@in_every_backend
@by_every_divergence
@pytest.mark.parametrize("distance", [0.1, 1e-2])
def test_student_near_its_teacher(
    distance: float, divergence: dict[str, Any], backend: str, dtype: torch.dtype
) -> None:
    """The gradient is the small difference of two distributions, and lost where either was rounded to bf16."""
    if dtype == torch.bfloat16:
        distance = max(distance, 0.1)  # nearer, bf16 logits say nothing of the difference
    random = torch.Generator().manual_seed(7)
    made = case(300, 40, 303, reduction="none", ce_weight=0.0, bias=False, **divergence)
    near = made.weight + distance * made.weight * torch.randn(made.weight.shape, generator=random)
    made = replace(made, teacher=TeacherHidden(made.hidden, near)).to(dtype)
    hold_case(made, backend, torch.ones(len(made.hidden)), alike=True)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@by_every_divergence
def test_bf16_logits_lose_nothing_but_one_rounding(divergence: dict[str, Any], backend: str) -> None:
    """A head that is the identity hands the logits over exactly: what remains is the rounding of the gradient, though
    the student is within 1 % of its teacher."""
    random = torch.Generator().manual_seed(8)
    logits = (2 * torch.randn(64, 256, generator=random)).bfloat16()
    teacher = logits.float() * (1 + 0.01 * torch.randn(64, 256, generator=random))
    made = case(64, 256, 256, bias=False, ce_weight=0.0, kd_weight=1.0, **divergence)
    made = replace(made, hidden=logits, weight=torch.eye(256).bfloat16(), teacher=TeacherLogits(teacher))
    exact, found = naive(made.to(torch.float64)), distilled(made, backend)
    error = (found["hidden"].double() - exact["hidden"]).norm() / exact["hidden"].norm()
    assert error < 2**-9, "half an ulp of bf16, at most"


@in_every_backend
@by_every_divergence
@pytest.mark.parametrize(
    ("teacher", "probability"), [("hidden", 0.99), ("hidden", 0.999), ("top k with tail", 0.999)]
)
def test_certain_rows(
    teacher: str, probability: float, divergence: dict[str, Any], backend: str, dtype: torch.dtype
) -> None:
    """Student and teacher both (nearly) sure of the target."""
    made = case(100, 64, 303, reduction="none", bias=False, ce_weight=0.3, **divergence)
    assert made.target is not None
    own = made.weight[made.target]
    for _ in range(15):
        logits = made.hidden @ made.weight.t()
        others = torch.logsumexp(logits.scatter(1, made.target[:, None], -torch.inf), 1)
        missing = others - logits.gather(1, made.target[:, None])[:, 0]
        missing += torch.logit(torch.tensor(probability))
        made = replace(made, hidden=made.hidden + (missing / own.square().sum(1))[:, None] * own)
    near = made.weight * (
        1 + 0.1 * torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(9))
    )
    made = replace(made, teacher=teacher_of(teacher, made.hidden, near, None, 1.0)).to(dtype)
    hold_case(made, backend, torch.ones(len(made.hidden)), alike=True)


@in_every_backend
@by_every_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_of_all_classes_is_the_full_divergence(
    temperature: float, divergence: dict[str, Any], backend: str, dtype: torch.dtype
) -> None:
    made = case(200, 40, 103, teacher="logits", temperature=temperature, **divergence).to(dtype)
    assert isinstance(made.teacher, TeacherLogits)
    log_probs = torch.log_softmax(made.teacher.logits.double() / temperature, 1)
    order = torch.rand(log_probs.shape, generator=torch.Generator().manual_seed(3)).argsort(1)
    exact = naive(made.to(torch.float64))
    own = owns(made, exact)
    for tail in (True, False):
        few = TeacherTopK(order, log_probs.gather(1, order).float(), tail=tail)
        for name, value in distilled(replace(made, teacher=few), backend).items():
            hold(value, exact[name], own[name], f"{name}, tail {tail}")


@in_every_backend
@from_every_teacher
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("rows", [0, 5])
def test_no_labelled_row(rows: int, reduction: str, teacher: str, backend: str, dtype: torch.dtype) -> None:
    made = case(rows, 24, 103, teacher=teacher, reduction=reduction, normalizer=torch.tensor(7.0)).to(dtype)
    assert made.target is not None
    made.target.fill_(-100)
    found = distilled(made, backend)
    assert found["loss"].shape == (() if reduction == "sum" else (rows,))
    for name, value in found.items():
        assert not value.any(), name


@in_every_backend
@from_every_teacher
def test_ignored_rows_count_for_neither_term(teacher: str, backend: str, dtype: torch.dtype) -> None:
    """Whatever student and teacher hold there."""
    made = case(100, 24, 103, teacher=teacher, ignored=0.5).to(dtype)
    assert made.target is not None
    whole = distilled(made, backend)
    assert not whole["hidden"][made.target == -100].any()
    kept = made.target != -100
    teacher_tensors = {
        name: value[kept]
        for name, value in vars(made.teacher).items()
        if isinstance(value, torch.Tensor) and name not in ("weight", "bias")
    }
    rest = replace(
        made,
        hidden=made.hidden[kept],
        target=made.target[kept],
        teacher=replace(made.teacher, **teacher_tensors),
    )
    for name, value in distilled(rest, backend).items():
        expected = whole[name][kept] if name == "hidden" else whole[name]
        torch.testing.assert_close(value, expected, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-4)


@in_every_backend
@from_every_teacher
def test_without_target(teacher: str, backend: str, dtype: torch.dtype) -> None:
    made = case(100, 40, 103, teacher=teacher, ce_weight=0.0, token_weight=torch.arange(100.0) % 5)
    hold_case(replace(made, target=None).to(dtype), backend)


@in_every_backend
@pytest.mark.parametrize("upstream", [-0.37, 4096.0])
def test_upstream_gradient(upstream: float, backend: str, dtype: torch.dtype) -> None:
    made = case(100, 40, 103, ignored=0.2, normalizer=torch.tensor(80.0)).to(dtype)
    hold_case(replace(made, upstream=upstream), backend)


@in_every_backend
@pytest.mark.usefixtures("small_chunks")
def test_each_rows_own_upstream_gradient(backend: str, dtype: torch.dtype) -> None:
    """reduction="none": not the first row's for all."""
    made = case(100, 40, 103, ignored=0.2, reduction="none").to(dtype)
    upstream = torch.randn(100, generator=torch.Generator().manual_seed(1))
    hold_case(made, backend, upstream)
    hold_case(made.given(normalizer=torch.tensor(80.0)), backend, upstream)


@in_every_backend
def test_micro_batches_add_up_to_the_batch(backend: str, dtype: torch.dtype) -> None:
    """Three unequal parts, each divided by the labelled rows of the whole."""
    made = case(200, 40, 103, teacher="logits", ignored=0.5, bias=False).to(dtype)
    assert made.target is not None
    assert isinstance(made.teacher, TeacherLogits)
    whole = made.given(normalizer=(made.target != -100).sum())
    exact = naive(whole.to(torch.float64))
    own = owns(whole, exact)
    parts = [
        distilled(
            replace(
                whole,
                hidden=made.hidden[rows],
                target=made.target[rows],
                teacher=TeacherLogits(made.teacher.logits[rows]),
            ),
            backend,
        )
        for rows in (slice(0, 10), slice(10, 150), slice(150, 200))
    ]
    hold(torch.cat([part["hidden"] for part in parts]), exact["hidden"], own["hidden"])
    for name in ("loss", "weight"):
        hold(sum(part[name].float() for part in parts), exact[name], own[name], name)
