"""Distillation's formulas, layer maps, sampling, alignment and refusals."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import log_softmax, rel_entr
from torch import Tensor

from tests.support import tiny_recipe
from tunesmith.batch import Batch
from tunesmith.distill.answers import answered, prompt_of
from tunesmith.distill.divergence import Divergence, Kind, TopK
from tunesmith.distill.initial import chosen
from tunesmith.distill.layers import layer_map
from tunesmith.distill.readings import real_tokens
from tunesmith.distill.rollout import Gumbel, gumbel
from tunesmith.distill.terms import AttentionTerm, apart, pooled
from tunesmith.distill.unlike import uld
from tunesmith.errors import UserError


def logits(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, generator=generator, dtype=torch.float64)


def softmax(values: Tensor, temperature: float) -> np.ndarray[Any, Any]:
    return np.exp(log_softmax(values.numpy() / temperature, axis=-1))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 4.0])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_divergences_are_scipys(kind: Kind, temperature: float) -> None:
    student, teacher, beta = logits(5, 7), logits(5, 7, seed=1), 0.3
    q, p = softmax(student, temperature), softmax(teacher, temperature)
    m = beta * p + (1 - beta) * q
    expected = {
        "forward_kl": rel_entr(p, q).sum(-1),
        "reverse_kl": rel_entr(q, p).sum(-1),
        "jsd": beta * rel_entr(p, m).sum(-1) + (1 - beta) * rel_entr(q, m).sum(-1),
    }[kind]
    found = Divergence(kind, beta, temperature)(student, teacher)
    np.testing.assert_allclose(found.numpy(), temperature**2 * expected, rtol=1e-10)


def test_jsd_is_gkds_written_with_log_target_kl_div() -> None:
    """GKD's generalised JSD as torch's kl_div has it: β·KL(teacher‖mixture) + (1−β)·KL(student‖mixture)."""
    student, teacher, beta = logits(4, 9), logits(4, 9, seed=1), 0.25
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = torch.logsumexp(torch.stack([log_q + math.log(1 - beta), log_p + math.log(beta)]), dim=0)
    kl = torch.nn.functional.kl_div
    expected = beta * kl(log_m, log_p, reduction="none", log_target=True) + (1 - beta) * kl(
        log_m, log_q, reduction="none", log_target=True
    )
    torch.testing.assert_close(Divergence("jsd", beta)(student, teacher), expected.sum(-1))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("bucket", [None, True, False])
def test_gradients_are_finite_differences(kind: Kind, bucket: bool | None) -> None:
    student, teacher = logits(3, 6).requires_grad_(), logits(3, 6, seed=1)
    divergence = Divergence(kind, 0.4, 2.0)
    given = teacher if bucket is None else TopK.of(teacher, 3, 2.0, bucket=bucket)
    if isinstance(given, TopK):
        given = TopK(given.indices, given.log_probs.double(), given.bucket)
    assert torch.autograd.gradcheck(lambda z: divergence(z, given), student)


def test_the_rest_of_top_k_is_a_bucket_or_left_out() -> None:
    student, teacher = logits(4, 8), logits(4, 8, seed=1)
    p, q = softmax(teacher, 2.0), softmax(student, 2.0)
    for row in range(4):
        best = np.argsort(-p[row])[:3]
        a, b = (
            np.append(p[row, best], 1 - p[row, best].sum()),
            np.append(q[row, best], 1 - q[row, best].sum()),
        )
        for bucket, pa, qb in ((True, a, b), (False, a[:3] / a[:3].sum(), b[:3] / b[:3].sum())):
            found = Divergence(temperature=2.0)(student, TopK.of(teacher, 3, 2.0, bucket=bucket))[row]
            assert float(found) == pytest.approx(4 * rel_entr(pa, qb).sum(), rel=1e-9)
    everything = TopK.of(teacher, 99, 2.0, bucket=True)
    whole = Divergence(temperature=2.0)
    torch.testing.assert_close(whole(student, everything), whole(student, teacher))


def test_labels_that_are_independent_diverge_one_by_one() -> None:
    student, teacher = logits(4, 3), logits(4, 3, seed=1)
    p, q = 1 / (1 + np.exp(-teacher.numpy() / 2)), 1 / (1 + np.exp(-student.numpy() / 2))
    expected = 4 * (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).mean(-1)
    found = Divergence(temperature=2.0).bernoulli(student, teacher)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    assert torch.autograd.gradcheck(
        lambda z: Divergence("jsd", 0.2).bernoulli(z, teacher), student.requires_grad_()
    )


def test_hidden_states_are_compared_by_squares_or_angles() -> None:
    a, b = logits(2, 3, 5).requires_grad_(), logits(2, 3, 5, seed=1)
    torch.testing.assert_close(
        apart(a, b, "mse"), torch.nn.functional.mse_loss(a, b, reduction="none").mean(-1)
    )
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    torch.testing.assert_close(apart(a, b, "cosine"), 1 - cosine)
    assert torch.autograd.gradcheck(lambda x: apart(x, b, "cosine"), a)
    assert torch.autograd.gradcheck(lambda x: apart(x, b, "mse"), a)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_attention_is_compared_over_keys(loss: Any) -> None:
    a, b = logits(2, 4, 3, 3).softmax(-1), logits(2, 4, 3, 3, seed=1).tril().softmax(-1)
    b = b.masked_fill(torch.ones(3, 3).triu(1).bool(), 0.0)
    term = AttentionTerm("attention", 1.0, (1.0,), loss)
    batch = Batch(
        {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])},
        {}, (0, 1), 5,
    )  # fmt: skip
    assert term.units(batch) == 5
    found = term({"distill_pairs": {"attention": [[(a, b)]]}}, batch, torch.tensor(5.0))
    each = rel_entr(b.numpy(), a.numpy()) if loss == "kl" else (a - b).square().numpy()
    kept = each.sum(-1).mean(1) * np.array([[1, 1, 1], [1, 1, 0]])
    assert float(found) == pytest.approx(kept.sum() / 5, rel=1e-6)


def test_rows_are_pooled_over_their_own_tokens() -> None:
    hidden, tokens = logits(2, 3, 4), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    torch.testing.assert_close(pooled(hidden, tokens, "mean")[1], hidden[1, :2].mean(0))
    torch.testing.assert_close(pooled(hidden, tokens, "last")[1], hidden[1, 1])
    torch.testing.assert_close(pooled(hidden, tokens, "cls"), hidden[:, 0])


def test_padding_of_packed_rows_is_no_token() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]])
    labels = torch.tensor([[-100, 5, -100, -100, 6, -100, -100], [-100, -100, 3, -100, -100, -100, -100]])
    batch = Batch({"input_ids": positions, "position_ids": positions}, {"labels": labels}, (0, 1, 2), 12)
    assert real_tokens(batch).sum(1).tolist() == [5, 7]
    assert int(real_tokens(batch.as_filler()).sum()) == 0


def test_layers_are_matched_evenly_or_as_named() -> None:
    assert layer_map("uniform", 3, 6, first=0, key="k") == {0: 0, 1: 2, 2: 4, 3: 6}
    assert layer_map("uniform", 2, 3, first=1, key="k") == {1: 2, 2: 3}
    assert layer_map({2: 5}, 3, 6, first=0, key="k") == {2: 5}
    with pytest.raises(UserError, match="k: the teacher has no layer 7: write 0 to 6"):
        layer_map({2: 7}, 3, 6, first=0, key="k")
    assert chosen("every_k", 3, 6) == [1, 3, 5]
    assert chosen("every_k", 4, 6) == [1, 2, 4, 5]
    assert chosen("first_k", 3, 6) == [0, 1, 2]
    assert chosen("last_k", 3, 6) == [3, 4, 5]
    assert chosen([0, 2, 5], 3, 6) == [0, 2, 5]
    with pytest.raises(UserError, match="names 2 layers: write 3 of 0 to 5"):
        chosen([0, 2], 3, 6)


def test_sorted_probabilities_of_unlike_vocabularies() -> None:
    student, teacher = logits(2, 5), logits(2, 3, seed=1)
    q, p = np.sort(softmax(student, 1.5))[:, ::-1], np.sort(softmax(teacher, 1.5))[:, ::-1]
    expected = np.abs(q - np.pad(p, ((0, 0), (0, 2)))).sum(-1)
    np.testing.assert_allclose(uld(student, teacher, 1.5).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(uld(teacher, student, 1.5).numpy(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda z: uld(z, teacher, 1.5), student.requires_grad_())


def test_the_greatest_noisy_score_is_a_sample() -> None:
    """Frequencies of 20,000 draws against softmax(z/T): χ² with 4 degrees of freedom is below 18.5 but 1 time in
    1,000, and the draws are always the same."""
    scores = torch.tensor([[1.0, 0.0, -1.0, 2.0, 0.5]])
    keys = torch.arange(20_000)
    drawn = Gumbel(keys, 1.5)(torch.zeros(1, 1), scores.expand(20_000, 5)).argmax(-1)
    expected = (scores[0] / 1.5).softmax(-1) * 20_000
    found = torch.bincount(drawn, minlength=5)
    assert float(((found - expected) ** 2 / expected).sum()) < 18.5
    assert torch.equal(gumbel(keys[7:8], 3, 50), gumbel(keys[:20], 3, 50)[7:8])
    assert not torch.equal(gumbel(keys[:1], 3, 50), gumbel(keys[:1], 4, 50))


def test_a_row_is_answered_behind_its_prompt() -> None:
    chat = {"input_ids": [1, 2, 3, 4, 5, 6, 7], "labels": [-100, -100, 3, -100, -100, 6, 7]}
    assert prompt_of(chat, "sft") == [1, 2, 3, 4, 5]
    assert answered(chat, "sft", [8, 9], 16) == {
        "input_ids": [1, 2, 3, 4, 5, 8, 9],
        "labels": [-100] * 5 + [8, 9],
    }
    assert cast(Any, answered(chat, "sft", [8, 9], 6))["input_ids"] == [1, 2, 3, 4, 5, 8]
    assert answered(chat, "sft", [8], 5) is None
    assert prompt_of({"input_ids": [1, 2, 3, 4, 5], "labels": []}, "causal_lm") == [1, 2]
    assert answered({"input_ids": [1, 2], "labels": [3]}, "seq2seq", [7], 4) == {
        "input_ids": [1, 2],
        "labels": [7],
    }


@pytest.mark.parametrize(
    ("settings", "sections", "told"),
    [
        ({}, {}, "distill.alpha: at 1 the teacher has no part"),
        ({"losses": []}, {}, "distill.losses: is empty"),
        ({"losses": [{"type": "logits"}, {"type": "logits"}]}, {}, "more than once"),
        ({"losses": [{"type": "logits", "beta": 0.3}]}, {}, "beta: has no effect with divergence: forward_kl"),
        ({"losses": [{"type": "logits", "rest": "bucket"}]}, {}, "rest: has no effect without top_k"),
        ({"losses": [{"type": "attention"}]}, {}, "set model.attn_implementation: eager"),
        ({"losses": [{"type": "hidden"}], "temperature": 2.0}, {}, "temperature: has no effect without a loss on"),
        ({"losses": [{"type": "embedding"}]}, {"data": {"packing": True}}, "embedding pools a row"),
        ({"on_policy": {}, "alpha": 0.5}, {}, "distill.alpha: must be 0 with on_policy"),
        ({"on_policy": {}}, {"data": {"packing": True}}, "set data.packing: false"),
        ({"on_policy": {}, "offline": {}}, {}, "and offline exclude each other"),
        ({"offline": {}, "losses": [{"type": "hidden"}]}, {}, "name a loss of type logits only"),
        ({"offline": {}, "losses": [{"type": "logits", "top_k": 3}]}, {}, "is offline.top_k here"),
        ({"sequence_level": True, "alpha": 0.5}, {}, "distill.alpha: has no effect without losses"),
        (
            {"teachers": [{"model_name_or_path": "t", "placement": "sharded"}]},
            {"parallel": {"strategy": "zero3"}},
            "sharded is for fsdp2; zero3 cannot",
        ),
        (
            {"teachers": [{"model_name_or_path": "t", "quantization": "nf4", "dtype": "bf16"}]},
            {},
            "dtype: has no effect with quantization",
        ),
        ({}, {"parallel": {"strategy": "fsdp2", "sequence_parallel_size": 2}}, "a teacher sees whole sequences"),
        ({"losses": [{"type": "hidden"}]}, {"trainable": {"cache_features": True}}, "hidden is of the backbone"),
        ({"init": "every_k"}, {"model": {"quantization": {"type": "nf4"}}}, "distill.init: copies weights"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_refused(
    tmp_path: Any, settings: dict[str, Any], sections: dict[str, Any], told: str
) -> None:
    chosen_settings = settings or ({"alpha": 1.0} if "parallel" not in sections else {})
    named = {} if "teachers" in chosen_settings else {"teacher_model_name_or_path": "teacher"}
    with pytest.raises(ValidationError) as caught:
        tiny_recipe(tmp_path, distill={**named, **chosen_settings}, **sections)
    assert told in str(caught.value)


def test_one_teacher_or_a_list() -> None:
    from tunesmith.recipe.distill import Distill

    with pytest.raises(ValidationError, match="write either teacher_model_name_or_path, or teachers"):
        Distill()
    short = Distill(teacher_model_name_or_path="t")
    assert [one.model_name_or_path for one in short.each_teacher] == ["t"]
    assert short.own_share == 0.5
    assert Distill.model_validate({"teacher_model_name_or_path": "t", "on_policy": {}}).own_share == 0.0
    assert Distill(teacher_model_name_or_path="t", sequence_level=True).own_share == 1.0
