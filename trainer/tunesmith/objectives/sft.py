"""Supervised fine-tuning on prompts with answers, or chats. The unit is a token; the loss is on the assistant's
turns and their end markers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunesmith.batch import IGNORED
from tunesmith.data import chat as chats
from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import Chat, Example
from tunesmith.data.table import Encoded
from tunesmith.objectives.base import Truncation
from tunesmith.objectives.causal_lm import DecoderObjective
from tunesmith.recipe.objective import SFT


class SFTObjective(DecoderObjective):
    accepts = (Chat,)

    def __init__(
        self,
        settings: SFT,
        tokenizer: Any,
        max_length: int,
        truncation: Truncation,
        chat_template: str | None,
    ) -> None:
        super().__init__(tokenizer, max_length, truncation, settings.label_smoothing_factor)
        self.settings = settings
        self.template = chats.resolve_template(tokenizer, chat_template)

    def notes(self) -> list[str]:
        return [self.template.note] if self.template.note else []

    @property
    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint | {
            "template": str(self.template),
            "on_prompt": self.settings.train_on_prompt,
        }

    def encode(self, example: Example) -> Iterator[Encoded | Dropped]:
        assert isinstance(example, Chat)
        found = chats.encode_chat(self.template, self.tokenizer, example, self.max_length, self.truncation)
        if isinstance(found, Dropped):
            yield found
            return
        ids = found.input_ids
        labels = list(ids) if self.settings.train_on_prompt else found.labels
        labels = [IGNORED, *labels[1:]]
        if all(label == IGNORED for label in labels):
            yield Dropped("no labelled token")
            return
        yield {"input_ids": ids, "labels": labels, "truncated": int(found.truncated)}
