"""The formulas of `regularization`, each by itself: divergences, perturbations, noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy, kstest
from torch import Tensor, nn

from tunesmith.batch import IGNORED, Batch
from tunesmith.engine.shards import Shard
from tunesmith.errors import UserError
from tunesmith.fused_head import FusedHead
from tunesmith.recipe.regularization import GradientNoise as NoiseSettings
from tunesmith.regularization.adversarial import into_ball, sequence_norms, sequence_numbers, unit_rows
from tunesmith.regularization.gradient_noise import BLOCK, GradientNoise, normal, shard_noise
from tunesmith.regularization.r_drop import both_ways, divergences, drops
from tunesmith.terms import (
    RowBinaryCrossEntropy,
    RowCrossEntropy,
    RowSquaredError,
    SpanCrossEntropy,
    Term,
    TokenCrossEntropy,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(targets: dict[str, Tensor], **inputs: Tensor) -> Batch:
    """Both copies of each row."""
    return Batch(inputs, targets, (0, 1), 8).repeated(2)


def scipy_both_ways(first: Tensor, second: Tensor) -> float:
    p, q = (torch.softmax(logits.double(), -1).numpy() for logits in (first, second))
    return float(entropy(p, q) + entropy(q, p))


# R-Drop


def test_the_divergence_is_that_of_scipy_and_its_gradient_that_of_differences() -> None:
    first, second = draw(5, 7), draw(5, 7, seed=1)
    expected = [scipy_both_ways(a, b) for a, b in zip(first, second, strict=True)]
    assert both_ways(first, second).tolist() == pytest.approx(expected, rel=1e-5)
    doubles = [first.double().requires_grad_(True), second.double().requires_grad_(True)]
    assert torch.autograd.gradcheck(both_ways, doubles)


def found(term: Term, outputs: dict[str, Any], asked: Batch, normalizer: float = 4.0) -> Tensor:
    (pairs,) = divergences([term], 1.0)
    return pairs(outputs, asked, torch.tensor(normalizer))


def test_rows_with_one_label() -> None:
    logits = draw(4, 3)
    asked = batch({"labels": torch.tensor([1, 2]), "row_mask": torch.tensor([1.0, 0.0])})
    got = found(RowCrossEntropy(), {"logits": logits}, asked, 2.0)
    assert float(got) == pytest.approx(scipy_both_ways(logits[0], logits[2]) / 2, rel=1e-5)


def test_rows_with_several_labels() -> None:
    logits = draw(4, 3)
    asked = batch({"labels": torch.ones(2, 3), "row_mask": torch.tensor([0.0, 1.0])})
    pairs = [
        scipy_both_ways(torch.stack([a, torch.zeros(())]), torch.stack([b, torch.zeros(())]))
        for a, b in zip(logits[1], logits[3], strict=True)
    ]
    got = found(RowBinaryCrossEntropy(), {"logits": logits}, asked, 2.0)
    assert float(got) == pytest.approx(np.mean(pairs) / 2, rel=1e-5)


def test_numbers() -> None:
    logits = torch.tensor([[1.0], [2.0], [4.0], [2.5]])
    asked = batch({"labels": torch.zeros(2, 1), "row_mask": torch.ones(2)})
    # both ways 2 · 3² and 2 · ½², over two rows that are there twice
    assert float(found(RowSquaredError(), {"logits": logits}, asked)) == pytest.approx((18 + 0.5) / 4)


def test_spans_over_a_rows_own_positions() -> None:
    start, end = draw(4, 5), draw(4, 5, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    targets = {"start": torch.tensor([1, 2]), "end": torch.tensor([3, 2]), "row_mask": torch.ones(2)}
    got = found(
        SpanCrossEntropy(), {"start_logits": start, "end_logits": end}, batch(targets, attention_mask=mask)
    )
    expected = sum(
        scipy_both_ways(side[row, :length], side[row + 2, :length]) / 2
        for side in (start, end)
        for row, length in ((0, 5), (1, 3))
    )
    assert float(got) == pytest.approx(expected / 4, rel=1e-5)


@pytest.mark.parametrize("shift", [False, True])
def test_tokens_with_and_without_logits(shift: bool) -> None:
    """The kernel's value and gradients, of hidden states and of the head, are those of the logits."""
    head = nn.Linear(8, 11)
    labels = torch.tensor([[IGNORED, 3, 4, IGNORED], [IGNORED, 5, IGNORED, IGNORED]])
    asked, term = batch({"labels": labels}), TokenCrossEntropy(shift=shift)
    values: list[float] = []
    gradients: list[list[Tensor]] = []
    for fused in (True, False):
        hidden = draw(4, 4, 8).requires_grad_(True)
        if fused:
            with FusedHead(head, None).standing_in():
                logits: Any = head(hidden)
        else:
            logits = head(hidden)
        got = found(term, {"logits": logits}, asked, 6.0)
        values.append(got.item())
        gradients.append(list(torch.autograd.grad(got, [hidden, head.weight, head.bias])))
    expected = 0.0
    whole = head(draw(4, 4, 8)).detach()
    for row, position in ((0, 1), (0, 2), (1, 1)):
        at = position - shift
        expected += scipy_both_ways(whole[row, at], whole[row + 2, at])
    assert values == pytest.approx([expected / 6] * 2, rel=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_each_term_has_a_divergence_of_its_weight() -> None:
    terms = [TokenCrossEntropy(name="masked", weight=1.0), RowCrossEntropy(name="next", weight=0.5)]
    assert [(t.name, t.weight) for t in divergences(terms, 3.0)] == [
        ("r_drop/masked", 3.0),
        ("r_drop/next", 1.5),
    ]
    assert [t.name for t in divergences(terms[:1], 3.0)] == ["r_drop"]

    @dataclass(frozen=True)
    class Other:
        name: str = "loss"
        weight: float = 1.0

        def units(self, batch: Batch) -> int:
            return 1

        def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
            return normalizer

    with pytest.raises(UserError, match=r"regularization\.r_drop: .* not know those of Other"):
        divergences([Other()], 1.0)


def test_what_drops_is_seen() -> None:
    attention = nn.Linear(2, 2)
    assert drops(nn.Dropout(0.1))
    assert not drops(nn.Dropout(0.0))
    assert not drops(attention)
    vars(attention)["attention_dropout"] = 0.1
    assert drops(attention)


# adversarial


def test_a_perturbation_is_as_long_as_its_row_alone_makes_it() -> None:
    gradient = draw(3, 4, 5)
    gradient[2] = 0.0
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    one = Batch({"input_ids": mask, "attention_mask": mask}, {}, (0, 1, 2), 10)
    sequences = sequence_numbers(one, gradient)
    unit = unit_rows(gradient, sequences)
    assert torch.allclose(unit[0], gradient[0] / gradient[0].norm())
    assert torch.allclose(unit[1, :2], gradient[1, :2] / gradient[1, :2].norm())
    assert not unit[1, 2:].any()
    assert not unit[2].any()
    # neither fp16's scale nor a tiny gradient changes it; an overflow leaves the row as it is
    for factor in (1e-25, 2.0**16):
        assert torch.allclose(unit_rows(gradient * factor, sequences), unit)
    gradient[0, 0, 0] = torch.inf
    assert not unit_rows(gradient, sequences)[0].any()


def test_packed_sequences_have_norms_of_their_own() -> None:
    values = draw(1, 5, 3)
    packed = Batch(
        {"input_ids": torch.ones(1, 5), "position_ids": torch.tensor([[0, 1, 0, 1, 2]])}, {}, (0, 1), 5
    )
    sequences = sequence_numbers(packed, values)
    norms = sequence_norms(values, sequences)[0, :, 0]
    first, second = values[0, :2].norm(), values[0, 2:].norm()
    assert torch.allclose(norms, torch.stack([first, first, second, second, second]))
    ball = into_ball(values, sequences, float(first) / 2)
    assert torch.allclose(ball[0, :2].norm(), first / 2)
    assert torch.allclose(into_ball(values, sequences, 100.0), values)


# noise


def test_the_noise_is_normal_and_a_function_of_name_place_seed_and_step() -> None:
    whole = normal("a.weight", 0, 2 * BLOCK + 100, 3, 5, torch.device("cpu"))
    assert kstest(whole[:100_000].numpy(), "norm").pvalue > 1e-3
    assert abs(float(whole.mean())) < 4 / len(whole) ** 0.5
    assert float(torch.corrcoef(torch.stack([whole[:BLOCK], whole[BLOCK : 2 * BLOCK]]))[0, 1].abs()) < 0.01
    for start, count in ((0, 10), (BLOCK - 3, 7), (17, BLOCK), (2 * BLOCK, 100)):
        part = normal("a.weight", start, count, 3, 5, torch.device("cpu"))
        assert part.equal(whole[start : start + count])
    for other in (("b.weight", 3, 5), ("a.weight", 4, 5), ("a.weight", 3, 6)):
        name, seed, step = other
        assert not normal(name, 0, 10, seed, step, torch.device("cpu")).equal(whole[:10])


def shards_of(name: str, value: Tensor) -> list[Shard]:
    """A run that cuts rows, whole rows, a part of every row."""
    shape = tuple(value.shape)
    flat = value.reshape(-1)
    return [
        Shard(name, flat[5:17], None, shape, 5),
        Shard(name, value[2:4], None, shape, 2 * shape[1], (2, 0)),
        Shard(name, value[:, 1:3], None, shape, 1, (0, 1)),
    ]


def test_a_shard_has_the_noise_of_its_elements() -> None:
    value = torch.zeros(6, 4)
    whole = normal("w", 0, 24, 1, 2, torch.device("cpu"))
    for shard in shards_of("w", value):
        assert shard_noise(shard, 1, 2).equal(whole[shard.positions()])


def test_the_noise_fades() -> None:
    part = GradientNoise(NoiseSettings(eta=0.3, gamma=0.55), 0)
    assert part.deviation(0) == pytest.approx(0.3**0.5)
    assert part.deviation(99) ** 2 == pytest.approx(0.3 / 100**0.55)
