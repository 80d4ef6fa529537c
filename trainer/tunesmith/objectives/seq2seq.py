"""Encoder-decoder generation (T5, BART): translation, summarisation. The unit is a target token."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import Chat, Example, SourceTarget
from tunesmith.data.table import Encoded, Kind, Table
from tunesmith.errors import DataError, UserError
from tunesmith.objectives.base import Objective, Truncation, pad_labels, text_inputs
from tunesmith.recipe.objective import Seq2Seq, SpanCorruption


class EncoderDecoderObjective(Objective):
    """What encoder-decoder objectives share: rows of `input_ids` and `labels` (the target with its end marker)."""

    def __init__(
        self, tokenizer: Any, max_length: int, truncation: Truncation, settings: Seq2Seq | SpanCorruption
    ) -> None:
        super().__init__(tokenizer, max_length, truncation)
        if tokenizer.eos_token_id is None:
            raise UserError("model.tokenizer: it has no eos token, without which a target has no end")
        self.use_loss(settings, settings.label_smoothing_factor)

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def collate(self, rows: Sequence[Encoded], places: Sequence[int]) -> Batch:
        inputs, tokens = text_inputs(self.tokenizer, rows)
        inputs.pop("token_type_ids", None)
        labels = pad_labels([row["labels"] for row in rows])
        return Batch(
            inputs, {"labels": labels}, tuple(places), tokens + sum(len(row["labels"]) for row in rows)
        )

    def outputs(self, model: nn.Module, batch: Batch, **options: Any) -> Mapping[str, Any]:
        ids = decoder_inputs(model, batch.targets["labels"])
        return model(**batch.inputs, decoder_input_ids=ids, use_cache=False, return_dict=True, **options)

    def loss_metrics(self, loss: float) -> dict[str, float]:
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf}


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """The labels moved right behind the model's own start token (−100 becomes padding): int64 [rows, positions].
    A model with a rule of its own (mBART's language codes) applies it."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels)
    config = model.config.get_text_config(decoder=True)
    start = config.decoder_start_token_id
    if start is None:
        raise UserError("model.config: decoder_start_token_id is missing")
    moved = labels.new_full(labels.shape, start)
    moved[:, 1:] = labels[:, :-1]
    return moved.masked_fill(moved < 0, config.pad_token_id)


class Seq2SeqObjective(EncoderDecoderObjective):
    accepts = (SourceTarget, Chat)
    prompt_padding = "right"
    kinds: ClassVar[dict[str, Kind]] = {"labels": "ints"}

    def __init__(self, settings: Seq2Seq, tokenizer: Any, max_length: int, truncation: Truncation) -> None:
        super().__init__(tokenizer, max_length, truncation, settings)
        self.settings = settings

    @property
    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint | self.settings.model_dump(include={"source_prefix", "max_target_length"})

    def encode(self, example: Example) -> Iterator[Encoded | Dropped]:
        """A source longer than `max_length` loses its end; a target longer than `max_target_length` is cut before
        its end marker, which it keeps."""
        source, targets = _source_and_targets(example)
        if not source.strip():
            yield Dropped("empty source")
            return
        ids: list[int] = self.tokenizer(self.settings.source_prefix + source, verbose=False)["input_ids"]
        labels = self._target(targets[0]) if targets else []
        if targets and not targets[0].strip():
            yield Dropped("empty target")
            return
        too_long = len(ids) > self.max_length, len(labels) > self.settings.max_target_length
        if any(too_long) and self.truncation == "drop":
            yield Dropped("longer than max_length" if too_long[0] else "target longer than max_target_length")
            return
        if too_long[0]:
            ids = self.tokenizer(
                self.settings.source_prefix + source, truncation=True, max_length=self.max_length
            )["input_ids"]
        if too_long[1]:
            labels = [*labels[: self.settings.max_target_length - 1], self.tokenizer.eos_token_id]
        yield {
            "input_ids": ids,
            "labels": labels,
            "references": json.dumps(list(targets), ensure_ascii=False),
            "truncated": int(any(too_long)),
        }

    def prompt(self, table: Table, row: int) -> Sequence[int]:
        return table.value("input_ids", row)

    def _target(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text_target=text, verbose=False)["input_ids"]
        eos = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [eos] else [*ids, eos]


def _source_and_targets(example: Example) -> tuple[str, tuple[str, ...]]:
    if isinstance(example, SourceTarget):
        return example.source, example.targets
    assert isinstance(example, Chat)
    roles = [message.role for message in example.messages]
    if roles not in (["user", "assistant"], ["user"], ["system", "user", "assistant"]):
        raise DataError("a sequence-to-sequence row is one prompt with one answer, not a chat", example.place)
    answers = [message.content for message in example.messages if message.role == "assistant"]
    prompt = "\n".join(message.content for message in example.messages if message.role != "assistant")
    return prompt, tuple(answers)
