"""Linear cross-entropy: its loss and gradients are as near to fp64's as torch's own, in every backend and dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from accuracy import hold, mutants, within
from head_cases import BACKENDS, Case, case, certain, fused, hold_case, naive
from tunesmith_kernels import linear_cross_entropy
from tunesmith_kernels.linear_loss import chunks

in_every_backend = pytest.mark.parametrize(("backend", "dtype"), BACKENDS)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 rows, or of as many as a small vocabulary allows."""
    monkeypatch.setitem(chunks._CHUNK_BYTES, "cpu", 1)
    monkeypatch.setitem(chunks._MIN_ROWS, "cpu", 32)


@in_every_backend
@pytest.mark.parametrize("vocab", [2, 7, 1003])
@pytest.mark.parametrize("features", [1, 24, 65])
@pytest.mark.parametrize("rows", [1, 37, 1000])
def test_odd_shapes(rows: int, features: int, vocab: int, backend: str, dtype: torch.dtype) -> None:
    hold_case(case(rows, features, vocab).to(dtype), backend)


@in_every_backend
@pytest.mark.parametrize(("rows", "vocab"), [(40, 50_304), (6, 128_256), (6, 151_936)])
def test_large_vocabularies(rows: int, vocab: int, backend: str, dtype: torch.dtype) -> None:
    hold_case(case(rows, 24, vocab, bias=False).to(dtype), backend)


@in_every_backend
@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.usefixtures("small_chunks")
def test_many_chunks(ignored: float, backend: str, dtype: torch.dtype) -> None:
    made = case(500, 65, 1003, ignored=ignored).to(dtype)
    assert chunks.chunk_rows(350, 1003, 4, "cpu") <= 32, "fewer than the chunks beyond which sums are in fp32"
    hold_case(made, backend)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.usefixtures("small_chunks")
def test_an_fp32_head_gets_its_gradient_summed_in_fp32(backend: str) -> None:
    """Beside bf16 hidden states, as under autocast. torch's own rounds the product's result once, to bf16."""
    made = case(500, 65, 1003, ignored=0.1).to(torch.bfloat16, head=torch.float32)
    # the head as the product sees it
    exact = naive(replace(made, weight=made.weight.bfloat16(), bias=made.bias.bfloat16()).to(torch.float64))
    own = naive(made)
    found = fused(made, backend)
    assert found["weight"].dtype == torch.float32
    for name, value in found.items():
        hold(value, exact[name], own[name], name)


@in_every_backend
@pytest.mark.parametrize("probability", [0.99, 0.999, 0.99999])
def test_certain_rows(probability: float, backend: str, dtype: torch.dtype) -> None:
    """p(target) → 1: the gradient's entry at the target is 1 − p, which s − 1 cancels away."""
    made = certain(200, probability)
    p = torch.softmax(made.hidden @ made.weight.t(), 1).gather(1, made.target[:, None])
    torch.testing.assert_close(1 - p, torch.full_like(p, 1 - probability), rtol=0.05, atol=0)
    hold_case(made.to(dtype), backend)


@in_every_backend
@pytest.mark.parametrize("ignored", [0.1, 0.9])
def test_ignored_rows(ignored: float, backend: str, dtype: torch.dtype) -> None:
    made = case(100, 24, 103, ignored=ignored).to(dtype)
    hold_case(made, backend)
    assert not fused(made, backend)["hidden"][made.target == -100].any()


@in_every_backend
def test_another_ignore_index(backend: str, dtype: torch.dtype) -> None:
    made = case(100, 24, 103).given(ignore_index=5).to(dtype)
    made.target[::3] = 5
    exact, own, found = naive(made.to(torch.float64)), naive(made), fused(made, backend)
    for name, value in found.items():
        hold(value, exact[name], own[name], name)


@in_every_backend
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("rows", [0, 5])
def test_no_labelled_row(rows: int, reduction: str, backend: str, dtype: torch.dtype) -> None:
    """All ignored, or none at all: loss and gradients are 0, not NaN, whatever the inputs."""
    made = case(rows, 24, 103).given(reduction=reduction, normalizer=torch.tensor(7.0)).to(dtype)
    made.target.fill_(-100)
    found = fused(made, backend)
    assert found["loss"].shape == (() if reduction == "sum" else (rows,))
    for name, value in found.items():
        assert not value.any(), name


@in_every_backend
def test_no_rows_of_soft_targets(backend: str, dtype: torch.dtype) -> None:
    made = replace(case(0, 24, 103).to(dtype), target=torch.zeros(0, 103))
    assert not any(value.any() for value in fused(made, backend).values())


@in_every_backend
@pytest.mark.parametrize("upstream", [-0.37, 4096.0])
def test_upstream_gradient(upstream: float, backend: str, dtype: torch.dtype) -> None:
    made = case(100, 24, 103, ignored=0.2).given(normalizer=torch.tensor(80.0)).to(dtype)
    hold_case(replace(made, upstream=upstream), backend)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(("normalizer", "scale"), [(1e6, 65536.0), (1.0, 65536.0 / 1024)])
def test_fp16_under_a_loss_scale(normalizer: float, scale: float, reduction: str) -> None:
    """Neither 1 / (a million tokens) is lost before the scale is known, nor does the scale overflow on top of ours."""
    made = (
        case(100, 24, 103).given(normalizer=torch.tensor(normalizer), reduction=reduction).to(torch.float16)
    )
    hold_case(
        replace(made, upstream=scale), "torch", torch.full((100,), scale) if reduction == "none" else None
    )


@in_every_backend
@pytest.mark.usefixtures("small_chunks")
def test_each_rows_own_upstream_gradient(backend: str, dtype: torch.dtype) -> None:
    """reduction="none": not the first row's for all."""
    made = case(100, 24, 103, ignored=0.2).given(reduction="none").to(dtype)
    upstream = torch.randn(100, generator=torch.Generator().manual_seed(1))
    hold_case(made, backend, upstream)
    hold_case(made.given(normalizer=torch.tensor(80.0)), backend, upstream)


@in_every_backend
def test_micro_batches_add_up_to_the_batch(backend: str, dtype: torch.dtype) -> None:
    """Three unequal parts, each divided by the labelled rows of the whole."""
    made = case(200, 24, 103, ignored=0.5).to(dtype)
    count = (made.target != -100).sum()
    whole = made.given(normalizer=count)
    exact, own = naive(whole.to(torch.float64)), naive(whole)
    parts = [
        fused(replace(whole, hidden=made.hidden[rows], target=made.target[rows]), backend)
        for rows in (slice(0, 10), slice(10, 150), slice(150, 200))
    ]
    hold(torch.cat([part["hidden"] for part in parts]), exact["hidden"], own["hidden"])
    for name in ("loss", "weight", "bias"):
        hold(sum(part[name].float() for part in parts), exact[name], own[name], name)


@in_every_backend
def test_leading_dimensions_and_views(backend: str, dtype: torch.dtype) -> None:
    """[B, T, H], hidden a transposed view, weight [H, V] as its transpose."""
    flat = case(60, 24, 103, ignored=0.2).to(dtype)
    hidden = flat.hidden.reshape(5, 12, 24).transpose(0, 1).contiguous().transpose(0, 1)
    weight = flat.weight.t().contiguous().t()
    assert not hidden.is_contiguous()
    assert not weight.is_contiguous()
    made = replace(flat, hidden=hidden, weight=weight, target=flat.target.reshape(5, 12))
    hold_case(made, backend)
    assert fused(made.given(reduction="none"), backend)["loss"].shape == (5, 12)


@in_every_backend
def test_tied_embedding(backend: str, dtype: torch.dtype) -> None:
    """The table's gradient is the sum of the head's and of the look-up's."""
    made = case(100, 24, 103).to(dtype)
    read = torch.randint(103, (100,), generator=torch.Generator().manual_seed(2))

    def gradient(made: Case, tied: bool) -> torch.Tensor:
        table = torch.nn.Embedding.from_pretrained(made.weight.clone(), freeze=False)
        hidden = torch.nn.functional.silu(table(read))
        if tied:
            loss = linear_cross_entropy(hidden, table.weight, made.target, backend=backend)
        else:
            logits = hidden @ table.weight.t()
            loss = torch.nn.functional.cross_entropy(
                logits.double() if logits.dtype == torch.float64 else logits.float(),
                made.target,
                reduction="sum",
            )
        loss.backward()
        return table.weight.grad

    exact, own = gradient(made.to(torch.float64), tied=False), gradient(made, tied=False)
    head_only = naive(replace(made.to(torch.float64), bias=None))["weight"]
    hold(gradient(made, tied=True), exact, own, head=head_only.to(dtype))


def test_the_rule_itself() -> None:
    """Equal to torch's error passes, half as much again passes, twice as much does not; nor does NaN."""
    exact = torch.randn(50, 8, dtype=torch.float64)
    noise = 1e-3 * torch.randn(50, 8, dtype=torch.float64)
    own = (exact + noise).float()
    assert within(own, exact, own)
    assert within((exact + 1.4 * noise).float(), exact, own)
    assert not within((exact + 1.6 * noise).float(), exact, own)
    assert not within(torch.full_like(own, torch.nan), exact, own)
    spike = own.clone()
    spike[3, 3] += 0.01
    assert not within(spike, exact, own), "a single wrong entry"
    assert [name for name, _ in mutants(own)] == ["zero", "negated", "doubled", "halved", "rows rolled"]
