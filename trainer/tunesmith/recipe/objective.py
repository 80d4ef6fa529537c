"""`objective`: what the model learns to do; one class per type, told apart by `type`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.recipe.base import Fraction, Positive, PositiveFloat, Section
from tunesmith.recipe.losses import ChosenLoss


class CausalLM(Section):
    """Next-token prediction on plain text. A document longer than `max_length` is cut into pieces, none is
    lost."""

    type: Literal["causal_lm"]
    loss: ChosenLoss = None
    label_smoothing_factor: Fraction = 0.0


class SFT(Section):
    """Supervised fine-tuning on prompts with answers, or chats; the loss is on the assistant's turns only,
    unless a message says otherwise with `train`."""

    type: Literal["sft"]
    loss: ChosenLoss = None
    label_smoothing_factor: Fraction = 0.0
    train_on_prompt: bool = False


class MaskedLM(Section):
    """BERT's masked language modelling (Devlin et al. 2019); `next_sentence` adds its second task."""

    type: Literal["masked_lm"]
    loss: ChosenLoss = None
    mlm_probability: Fraction = 0.15
    mask_replace_prob: Fraction = 0.8
    random_replace_prob: Fraction = 0.1
    next_sentence: bool = False


class SpanCorruption(Section):
    """T5's denoising of spans (Raffel et al. 2020): spans replaced by sentinels, the target restores them."""

    type: Literal["span_corruption"]
    loss: ChosenLoss = None
    noise_density: Fraction = 0.15
    mean_noise_span_length: PositiveFloat = 3.0
    label_smoothing_factor: Fraction = 0.0


class Classification(Section):
    """Sequence classification of a text or a pair: one label, several labels, or numbers (regression)."""

    type: Literal["classification"]
    loss: ChosenLoss = None
    problem: Literal["auto", "single_label", "multi_label", "regression"] = "auto"
    labels: list[str] | None = None
    label_smoothing_factor: Fraction = 0.0


class TokenClassification(Section):
    """Tags on words; the loss is on each word's first piece (`label_all_pieces`: on all)."""

    type: Literal["token_classification"]
    loss: ChosenLoss = None
    labels: list[str] | None = None
    label_all_pieces: bool = False
    label_smoothing_factor: Fraction = 0.0


class QuestionAnswering(Section):
    """Extractive answers (SQuAD). Long contexts are read in windows that overlap by `doc_stride` tokens."""

    type: Literal["question_answering"]
    loss: ChosenLoss = None
    doc_stride: Positive = 128
    max_answer_length: Positive = 30
    n_best_size: Positive = 20


class Seq2Seq(Section):
    """Encoder-decoder generation: translation, summarisation."""

    type: Literal["seq2seq"]
    loss: ChosenLoss = None
    source_prefix: str = ""
    max_target_length: Positive = 128
    label_smoothing_factor: Fraction = 0.0


Objective = Annotated[
    CausalLM
    | SFT
    | MaskedLM
    | SpanCorruption
    | Classification
    | TokenClassification
    | QuestionAnswering
    | Seq2Seq,
    Field(discriminator="type"),
]
