"""A chat template, and the rendering of chats by it (the tokenizer's `apply_chat_template`)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.examples import Chat, Message

# what a template's own code can raise: its raise_exception, undefined names, and Python's errors on odd rows
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)

_TESTING_METHODS = {
    "split",
    "rsplit",
    "partition",
    "startswith",
    "endswith",
    "find",
    "rfind",
    "index",
    "replace",
}


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template as it renders with the tokenizer that it was resolved for.

    `source` is complete: export it as the tokenizer's `chat_template`. `tool_source` renders chats that
    bring tools (a tokenizer may name two templates). `end_marker` is the text that closes an answer which
    another turn follows, `final_marker` the one that closes the last answer; "" where the template writes
    none. Generation stops at any of `stop_token_ids` or `stop_strings`. `note` is the start-up report's
    line.
    """

    name: str
    source: str
    tool_source: str
    end_marker: str
    final_marker: str
    stop_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    note: str
    looked_for: tuple[str, ...]  # strings that the template's code looks for in a content, e.g. </think>
    tokens: re.Pattern[str]  # matches the tokenizer's added tokens
    cache: dict[object, Any] = field(default_factory=dict[object, Any], compare=False, repr=False)

    def source_for(self, chat: Chat) -> str:
        return self.tool_source if chat.tools else self.source


def render(
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The chat as text, special tokens written out. DataError where the template refuses the chat."""
    source = template.source_for(chat)
    for what, used in (("tools", chat.tools), ("tool_calls", any(m.tool_calls for m in chat.messages))):
        if used and what not in source:
            raise DataError(f"the chat template ({template.name}) does not render {what}", chat.place)
    messages = [as_dict(message) for message in chat.messages]
    try:
        return draw(tokenizer, source, messages, chat.tools, add_generation_prompt)
    except TEMPLATE_ERRORS as error:
        raise DataError(
            f"the chat template ({template.name}) refuses this chat: {error}", chat.place
        ) from error


def as_dict(message: Message) -> dict[str, Any]:
    """The message as templates know it."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        plain["tool_calls"] = list(message.tool_calls)
    return plain


def draw(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    messages: list[dict[str, Any]],
    tools: tuple[dict[str, Any], ...],
    add_generation_prompt: bool,
) -> str:
    """`apply_chat_template` to text; raises one of TEMPLATE_ERRORS."""
    return cast(
        str,
        tokenizer.apply_chat_template(
            cast(Any, messages),
            tools=list(tools) or None,
            chat_template=source,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        ),
    )
