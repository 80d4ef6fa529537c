"""What the loss of each objective computes, on batches made up of shapes alone: the model class, the inputs, the
targets and the terms are those of `tunesmith.objectives`, without their tokenizers and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.losses.choose import planned_term
from tunesmith.objectives.base import Objective
from tunesmith.objectives.seq2seq import decoder_inputs
from tunesmith.recipe import objective as settings
from tunesmith.terms import (
    RowBinaryCrossEntropy,
    RowCrossEntropy,
    RowSquaredError,
    SpanCrossEntropy,
    Term,
    TokenCrossEntropy,
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A micro-batch: `rows` sequences of `length` tokens, `target_length` on the decoder's side of an
    encoder-decoder. `padded`: some rows are shorter, so that the attention has a mask. `packed`: several samples
    share a sequence."""

    rows: int
    length: int
    target_length: int = 0
    padded: bool = True
    packed: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * (self.length + self.target_length)


@dataclass(frozen=True, slots=True)
class Task:
    """An objective as far as memory and time can tell. It stands in for an `Objective` in a TrainModule."""

    auto_class_name: str
    terms: tuple[Term, ...]
    kind: str  # what the targets are: tokens | rows | numbers | spans | sequence
    token_types: bool = False
    predict = Objective.predict  # the metrics of what has a language model's head need no logits

    @property
    def auto_class(self) -> Any:
        import transformers

        return getattr(transformers, self.auto_class_name)

    def outputs(self, model: nn.Module, batch: Batch, **options: Any) -> Mapping[str, Any]:
        inputs: dict[str, Any] = {**batch.inputs, **options}
        if self.kind == "sequence":
            inputs["decoder_input_ids"] = decoder_inputs(model, batch.targets["labels"])
        if self.auto_class_name in {"AutoModelForCausalLM", "AutoModelForSeq2SeqLM"}:
            inputs["use_cache"] = False
        return model(**inputs, return_dict=True)

    def batch(self, shape: Shape, config: Any, device: torch.device) -> Batch:
        """A batch of that shape; the numbers in it mean nothing."""

        def ones(*size: int) -> Tensor:
            return torch.ones(size, dtype=torch.int64, device=device)

        rows, length = shape.rows, shape.length
        inputs = {"input_ids": ones(rows, length)}
        inputs["position_ids" if shape.packed else "attention_mask"] = ones(rows, length)
        if self.token_types and getattr(config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = ones(rows, length)
        targets: dict[str, Tensor] = {"row_mask": torch.ones(rows, device=device)}
        match self.kind:
            case "tokens":
                targets["labels"] = ones(rows, length)
            case "sequence":
                targets["labels"] = ones(rows, shape.target_length)
            case "spans":
                targets |= {"start": ones(rows), "end": ones(rows)}
            case "numbers":
                targets["labels"] = torch.ones(rows, config.num_labels, device=device)
            case _:
                targets["labels"] = ones(rows)
        if any(term.name == "next_sentence" for term in self.terms):
            targets["next_sentence"] = ones(rows)
        return Batch(inputs, targets, tuple(range(rows)), rows * length)


def task_of(objective: settings.Objective) -> Task:
    """The task of a recipe's objective. `problem: auto` counts as one label per row: the head's width is nothing
    beside the rest."""
    match objective:
        case settings.CausalLM() | settings.SFT():
            term = planned_term(objective.loss, objective.label_smoothing_factor, shift=True)
            return Task("AutoModelForCausalLM", (term,), "tokens")
        case settings.MaskedLM(next_sentence=True):
            terms = (
                planned_term(objective.loss, name="mlm", logits="prediction_logits"),
                RowCrossEntropy(
                    name="next_sentence", logits="seq_relationship_logits", target="next_sentence"
                ),
            )
            return Task("AutoModelForPreTraining", terms, "tokens", token_types=True)
        case settings.MaskedLM():
            return Task("AutoModelForMaskedLM", (planned_term(objective.loss),), "tokens", token_types=True)
        case settings.Classification(problem="multi_label"):
            return Task("AutoModelForSequenceClassification", (RowBinaryCrossEntropy(),), "numbers", True)
        case settings.Classification(problem="regression"):
            return Task("AutoModelForSequenceClassification", (RowSquaredError(),), "numbers", True)
        case settings.Classification():
            return Task("AutoModelForSequenceClassification", (RowCrossEntropy(),), "rows", True)
        case settings.TokenClassification():
            return Task("AutoModelForTokenClassification", (TokenCrossEntropy(),), "tokens", True)
        case settings.QuestionAnswering():
            return Task("AutoModelForQuestionAnswering", (SpanCrossEntropy(),), "spans", True)
        case settings.SpanCorruption() | settings.Seq2Seq():
            term = planned_term(objective.loss, objective.label_smoothing_factor)
            return Task("AutoModelForSeq2SeqLM", (term,), "sequence")


def target_length(objective: settings.Objective, length: int) -> int:
    """Tokens on the decoder's side; 0 where there is none. Span corruption's target is the noise, a sentinel for
    each span and the end marker (Raffel et al. 2020)."""
    match objective:
        case settings.Seq2Seq(max_target_length=longest):
            return longest
        case settings.SpanCorruption(noise_density=density, mean_noise_span_length=span):
            noise = max(1, round((length - 1) * density))
            return noise + max(1, round(noise / span)) + 1
        case _:
            return 0


def source_length(objective: settings.Objective, length: int) -> int:
    """Tokens that the (first) stack reads: span corruption leaves out the noise but for a sentinel for each span."""
    if not isinstance(objective, settings.SpanCorruption):
        return length
    noise = max(1, round((length - 1) * objective.noise_density))
    return length - 1 - noise + max(1, round(noise / objective.mean_noise_span_length)) + 1
