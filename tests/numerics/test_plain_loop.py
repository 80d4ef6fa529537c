"""A run equals a plain PyTorch loop, written here without a line of ours but for the order and the rows: the model of
transformers, one padded batch per step, cross-entropy summed and divided by the units, torch's own optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from torch import Tensor, nn

from objective_cases import (
    ADAMW,
    CASES,
    SGD,
    TOLERANCE,
    WHOLE,
    Case,
    Result,
    Run,
    TrainingRows,
    apart,
    open_rows,
    recipe,
    weights_apart,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Plain:
    """How an objective is done by hand: the head's class, and a step's loss from its rows."""

    model: Any
    loss: Callable[[Any, list[Row]], Tensor]


def padded(rows: list[Row], key: str, value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(
        [torch.tensor(np.asarray(row[key]), dtype=torch.long) for row in rows], True, value
    )


def inputs(rows: list[Row]) -> dict[str, Tensor]:
    """Every tokenizer here pads with 0."""
    made = {"input_ids": padded(rows, "input_ids", 0)}
    made["attention_mask"] = padded([{"one": np.ones(len(row["input_ids"]))} for row in rows], "one", 0)
    if "token_type_ids" in rows[0]:
        made["token_type_ids"] = padded(rows, "token_type_ids", 0)
    return made


def per_token(logits: Tensor, labels: Tensor) -> Tensor:
    units = (labels != -100).sum()
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum") / units


def next_token(model: Any, rows: list[Row]) -> Tensor:
    # all tokens but a text's first, whatever `labels` says of the others
    labels = padded(rows, "input_ids", -100)
    return per_token(model(**inputs(rows)).logits[:, :-1], labels[:, 1:])


def answers(model: Any, rows: list[Row]) -> Tensor:
    return per_token(model(**inputs(rows)).logits[:, :-1], padded(rows, "labels", -100)[:, 1:])


def tokens(model: Any, rows: list[Row]) -> Tensor:
    return per_token(model(**inputs(rows)).logits, padded(rows, "labels", -100))


def masked_and_next(model: Any, rows: list[Row]) -> Tensor:
    found = model(**inputs(rows))
    follows = torch.tensor([row["next_sentence"] for row in rows])
    masked = per_token(found.prediction_logits, padded(rows, "labels", -100))
    return masked + F.cross_entropy(found.seq_relationship_logits, follows, reduction="sum") / len(rows)


def target_tokens(model: Any, rows: list[Row]) -> Tensor:
    labels = padded(rows, "labels", -100)
    start = torch.full((len(rows), 1), model.config.decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)  # 0 pads
    return per_token(model(**inputs(rows), decoder_input_ids=shifted).logits, labels)


def one_label(model: Any, rows: list[Row]) -> Tensor:
    labels = torch.tensor([int(row["labels"][0]) for row in rows])
    return F.cross_entropy(model(**inputs(rows)).logits, labels, reduction="sum") / len(rows)


def several_labels(model: Any, rows: list[Row]) -> Tensor:
    logits = model(**inputs(rows)).logits
    losses = [
        F.softplus(logit if label not in row["labels"] else -logit)
        for row, scores in zip(rows, logits, strict=True)
        for label, logit in enumerate(scores)
    ]
    return torch.stack(losses).sum() / (3 * len(rows))


def numbers(model: Any, rows: list[Row]) -> Tensor:
    wanted = torch.tensor([float(row["numbers"][0]) for row in rows])
    return (model(**inputs(rows)).logits[:, 0] - wanted).square().sum() / len(rows)


def spans(model: Any, rows: list[Row]) -> Tensor:
    """Row by row, without padding."""
    total = torch.zeros(())
    for row in rows:
        found = model(**inputs([row]))
        for logits, end in ((found.start_logits, "start"), (found.end_logits, "end")):
            total = total + F.cross_entropy(logits, torch.tensor([row[end]])) / 2
    return total / len(rows)


_classifier = transformers.AutoModelForSequenceClassification
_causal, _seq2seq = transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM
PLAIN = {
    "causal_lm": Plain(_causal, next_token),
    "causal_lm_gpt2": Plain(_causal, next_token),
    "sft": Plain(_causal, answers),
    "masked_lm": Plain(transformers.AutoModelForMaskedLM, tokens),
    "next_sentence": Plain(transformers.AutoModelForPreTraining, masked_and_next),
    "span_corruption": Plain(_seq2seq, target_tokens),
    "single_label": Plain(_classifier, one_label),
    "multi_label": Plain(_classifier, several_labels),
    "regression": Plain(_classifier, numbers),
    "pairs": Plain(_classifier, one_label),
    "token_classification": Plain(transformers.AutoModelForTokenClassification, tokens),
    "question_answering": Plain(transformers.AutoModelForQuestionAnswering, spans),
    "seq2seq_t5": Plain(_seq2seq, target_tokens),
    "seq2seq_bart": Plain(_seq2seq, target_tokens),
}


def plain_run(
    model: nn.Module, loss_of: Callable[[Any, list[Row]], Tensor], rows: TrainingRows, steps: int,
    optimizer: torch.optim.Optimizer, decay_to_zero: bool, max_norm: float | None,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Losses and gradient norms (before clipping) of every step."""
    losses, norms = [], []
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps) if decay_to_zero else rate
        loss = loss_of(model, rows(step))
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
        if max_norm is not None:
            for gradient in gradients:
                gradient.mul_(min(1.0, max_norm / (float(norm) + 1e-6)))
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms


def plain_model(workshop: Path, case: Case) -> Any:
    model = PLAIN[case.name].model.from_pretrained(workshop / "models" / case.model)
    return model.train()


def assert_same(found: Result, losses: list[float], norms: list[float]) -> None:
    for key, expected in (("loss", losses), ("grad_norm", norms)):
        worst = max(apart(a, b) for a, b in zip(found.curve(key), expected, strict=True))
        assert worst <= TOLERANCE, f"{key} differs by {worst:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_unclipped_sgd(train: Run, workshop: Path, case: str) -> None:
    found = train(case, SGD, WHOLE, 20)
    rows = open_rows(recipe(workshop, CASES[case], SGD, WHOLE, 20), workshop)
    model = plain_model(workshop, CASES[case])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=SGD["optim"]["learning_rate"])
    losses, norms = plain_run(model, PLAIN[case].loss, rows, 20, optimizer, False, None)
    assert_same(found, losses, norms)
    expected = {name: model.state_dict()[name] for name in found.weights}
    apart_by = weights_apart(found.weights, expected)
    assert max(apart_by.values()) <= TOLERANCE, max(apart_by, key=apart_by.__getitem__)
    moved = weights_apart({name: before[name] for name in expected}, expected)
    assert max(moved.values()) > 1000 * TOLERANCE, "a run that goes nowhere proves nothing"


@pytest.mark.parametrize("case", ["causal_lm", "multi_label"])
def test_clipped_sgd_with_momentum(train: Run, workshop: Path, case: str) -> None:
    """Here, unlike under AdamW, a clipped gradient of a wrong length moves the weights otherwise."""
    asked = {**SGD, "optim": {"name": "sgd", "learning_rate": 0.5, "momentum": 0.8, "max_grad_norm": 0.1}}
    found = train(case, asked, WHOLE, 20)
    rows = open_rows(recipe(workshop, CASES[case], asked, WHOLE, 20), workshop)
    model = plain_model(workshop, CASES[case])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.8)
    losses, norms = plain_run(model, PLAIN[case].loss, rows, 20, optimizer, False, 0.1)
    assert min(norms) > 0.1
    assert_same(found, losses, norms)
    assert (
        max(weights_apart(found.weights, {n: model.state_dict()[n] for n in found.weights}).values())
        <= TOLERANCE
    )


@pytest.mark.parametrize("case", CASES)
def test_clipped_adamw(train: Run, workshop: Path, case: str) -> None:
    settings = ADAMW["optim"]
    found = train(case, ADAMW, WHOLE, 30)
    rows = open_rows(recipe(workshop, CASES[case], ADAMW, WHOLE, 30), workshop)
    model = plain_model(workshop, CASES[case])
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=settings["learning_rate"])
    losses, norms = plain_run(model, PLAIN[case].loss, rows, 30, optimizer, True, settings["max_grad_norm"])
    assert_same(found, losses, norms)


@pytest.mark.parametrize("case", [name for name in CASES if name != "question_answering"])
def test_the_loss_is_that_of_transformers(train: Run, workshop: Path, case: str) -> None:
    """On one whole batch the mean that transformers' own heads take is the loss that is meant here (its question
    answering lets padding into the softmax)."""
    found = train(case, SGD, WHOLE, 20)
    batch = open_rows(recipe(workshop, CASES[case], SGD, WHOLE, 20), workshop)(0)
    labels: dict[str, Tensor] = {}
    match case:
        case "causal_lm" | "causal_lm_gpt2":
            labels["labels"] = padded(batch, "input_ids", -100)
        case "single_label" | "pairs":
            labels["labels"] = torch.tensor([int(row["labels"][0]) for row in batch])
        case "multi_label":
            labels["labels"] = torch.tensor([[float(i in row["labels"]) for i in range(3)] for row in batch])
        case "regression":
            labels["labels"] = torch.tensor([float(row["numbers"][0]) for row in batch])
        case _:
            labels["labels"] = padded(batch, "labels", -100)
    if case == "next_sentence":
        labels["next_sentence_label"] = torch.tensor([row["next_sentence"] for row in batch])
    with torch.no_grad():
        loss = float(plain_model(workshop, CASES[case])(**inputs(batch), **labels).loss)
    assert apart(found.curve("loss")[0], loss) <= TOLERANCE
