"""Supervised fine-tuning on prompts with answers, or chats. The unit is a token; the loss is on the assistant's
turns and their end markers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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
        *,
        generates: bool = False,
    ) -> None:
        super().__init__(tokenizer, max_length, truncation, settings, generates=generates)
        self.settings = settings
        self.template = chats.resolve_template(tokenizer, chat_template)
        # what is exported with the model must render as the training did
        tokenizer.chat_template = (
            self.template.source
            if self.template.tool_source == self.template.source
            else {"default": self.template.source, "tool_use": self.template.tool_source}
        )

    def notes(self) -> list[str]:
        return super().notes() + ([self.template.note] if self.template.note else [])

    @property
    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint | {
            "template": str(self.template),
            "on_prompt": self.settings.train_on_prompt,
        }

    def encode(self, example: Example) -> Iterator[Encoded | Dropped]:
        assert isinstance(example, Chat)
        everything = self.settings.train_on_prompt
        excluded = any(message.train is False for message in example.messages)
        if everything and excluded:
            # all turns but those that the data takes out; without any such, the template's own text is trained too
            turns = tuple(replace(turn, train=turn.train is not False) for turn in example.messages)
            example = replace(example, messages=turns)
        found = chats.encode_chat(self.template, self.tokenizer, example, self.max_length, self.truncation)
        if isinstance(found, Dropped):
            yield found
            return
        ids = found.input_ids
        labels = list(ids) if everything and not excluded else found.labels
        labels = [IGNORED, *labels[1:]]
        if all(label == IGNORED for label in labels):
            yield Dropped("no labelled token")
            return
        row: Encoded = {"input_ids": ids, "labels": labels, "truncated": int(found.truncated)}
        if found.partial:
            row["changed"] = "the chat template leaves out part of a trained turn"
        if self.generates:
            prompt = chats.prompt_ids(self.template, self.tokenizer, example)
            row |= self._asked(prompt, chats.reference(example))
        yield row

    def prompt_row(self, example: Example) -> Encoded | Dropped:
        """The chat up to the turn that is to be answered: an answer at its end is left out."""
        assert isinstance(example, Chat)
        turns = example.messages
        turns = turns[:-1] if turns[-1:] and turns[-1].role == "assistant" else turns
        if not any(turn.content.strip() for turn in turns):
            return Dropped("empty prompt")
        text = chats.render(
            self.template, self.tokenizer, replace(example, messages=turns), add_generation_prompt=True
        )
        return {"input_ids": self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]}

    def stop_token_ids(self) -> list[int]:
        return list(self.template.stop_token_ids)

    def stop_strings(self) -> list[str]:
        """Markers that are ordinary text, and the ordinary text of markers that end with a token."""
        markers = (self.template.end_marker, self.template.final_marker)
        texts = [self.template.tokens.sub("", marker).strip() for marker in markers]
        return list(dict.fromkeys(text for text in texts if text))
