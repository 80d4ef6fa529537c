"""Which characters of a rendered chat are the answers, for any template.

The chat is rendered a second time with every content replaced by a *slot*, a word that occurs nowhere else;
the white space around a content, and the strings that the template's code looks for in it, stay. What is
between the slots is then what the template itself writes, whatever the contents say, and the real text must
be that text with the slots filled: this is checked, character for character. On the slotted text an answer

- starts where the generation prompt for it ends, so at the place where generation starts;
- ends with its end marker, found in what the template writes after the content and before the next turn: the
  part that the chat cut off after this answer, rendered, has in common with the whole chat.

A template with `{% generation %}` blocks says itself where answers are; a block that leaves out the end
marker is extended by it. A template that rewrites contents (the check fails) is read by rendering the real
chat's beginnings alone. What neither reads without doubt is a DataError that names the row.

Where a chat's shape (roles, slots, tools) was seen before, its slotted text is remembered: one rendering a
chat.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.data.chat_places import SLOT, Span, Turn, find_spans, is_trained, slot_name
from tunesmith.data.chat_template import TEMPLATE_ERRORS, ChatTemplate, as_dict, draw, render
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.examples import Chat

_MAX_SHAPES = 2048  # remembered; chats with tools have a shape each


@dataclass(frozen=True, slots=True)
class Layout:
    """A rendered chat: its text, the trained spans in order, and where each message's content stands (empty
    where the template rewrites contents). `partial`: the template leaves out a part of a trained content,
    such as its thoughts."""

    text: str
    spans: list[Span]
    contents: list[Span]
    partial: bool


@dataclass(frozen=True, slots=True)
class _Shape:
    """The slotted text, cut at its slots (`literals` is one longer than `slots`), with the trained spans."""

    literals: list[str]
    slots: list[int]
    spans: list[Span]


def spans(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[str, list[Span]]:
    """The rendered chat and its trained spans, each with its end marker, in order and without overlap.

    A message may have several spans (a template that marks parts of it), and has none where the template's
    own `{% generation %}` blocks leave it out. The span of a trained message of another role is its
    content, and the end marker where that follows directly. DataError where the template refuses the chat,
    does not render a trained message, or leaves doubt about its place."""
    laid = layout(template, tokenizer, chat)
    return laid.text, laid.spans


def layout(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Layout:
    """`spans`, with the places of all contents."""
    text = render(template, tokenizer, chat)
    messages, turns, values = _slotted(chat, template.looked_for)
    key = (
        tuple(message.train for message in chat.messages),
        tuple((m["role"], m["content"]) for m in messages),
        json.dumps([m.get("tool_calls") for m in messages])
        if any(turn.has_calls for turn in turns)
        else None,
        json.dumps(chat.tools) if chat.tools else None,
    )
    if key not in template.cache:
        if len(template.cache) >= _MAX_SHAPES:
            template.cache.clear()
        template.cache[key] = _shape(template, tokenizer, chat, messages, turns)
    shape: _Shape | None = template.cache[key]
    owners = [i for i, turn in enumerate(turns) for _ in turn.slots]
    filled = None if shape is None else _fill(shape, values, text, owners)
    if shape is None or filled is None:
        return Layout(text, _read_beginnings(template, tokenizer, chat, text), [], partial=False)
    rendered = {*shape.slots}
    trained = [slot for slot, owner in enumerate(owners) if is_trained(chat.messages[owner])]
    return Layout(text, *filled, partial=not rendered.issuperset(trained))


def _slotted(
    chat: Chat, looked_for: tuple[str, ...]
) -> tuple[list[dict[str, Any]], list[Turn], dict[int, str]]:
    """The chat's messages with slots, how each is built, and the slots' values. Content slots are numbered
    first and in order; tool calls' names after them."""
    messages: list[dict[str, Any]] = []
    turns: list[Turn] = []
    values: dict[int, str] = {}
    calls: list[tuple[int, str]] = []
    for message in chat.messages:
        kept = [text for text in looked_for if text in message.content]
        pieces = (
            re.split(f"({'|'.join(map(re.escape, kept))})", message.content) if kept else [message.content]
        )
        first = len(values)
        for k, piece in enumerate(pieces):
            core = piece.strip()
            if core and k % 2 == 0:  # the odd pieces are the separators
                before, after = piece.split(core, 1)
                pieces[k] = before + slot_name(len(values)) + after
                values[len(values)] = core
        if len(values) == first and not message.tool_calls:  # an empty content has its place too
            pieces[-1] += slot_name(first)
            values[first] = ""
        numbers = tuple(range(first, len(values)))
        content = "".join(pieces)
        found = list(SLOT.finditer(content))
        lead, trail = (content[: found[0].start()], content[found[-1].end() :]) if found else ("", "")
        call = None
        plain = as_dict(message)
        plain["content"] = content
        if message.tool_calls:
            function = message.tool_calls[0].get("function", message.tool_calls[0])
            name = function.get("name")
            if isinstance(name, str) and name:
                call = 99_999 - len(calls)
                calls.append((call, name))
                named = {**function, "name": slot_name(call)}
                outer = message.tool_calls[0]
                plain["tool_calls"] = [
                    {**outer, "function": named} if "function" in outer else named,
                    *message.tool_calls[1:],
                ]
        messages.append(plain)
        turns.append(Turn(message.role, lead, trail, numbers, call, bool(message.tool_calls)))
    values.update(calls)
    return messages, turns, values


def _shape(
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    messages: list[dict[str, Any]],
    turns: list[Turn],
) -> _Shape | None:
    """The slotted chat with its trained spans; None where it cannot be rendered or read."""
    try:
        whole = draw(tokenizer, template.source_for(chat), messages, chat.tools, False)
    except TEMPLATE_ERRORS:
        return None
    found = find_spans(template, tokenizer, chat, messages, turns, whole)
    if isinstance(found, int):
        return None
    pieces = SLOT.split(whole)
    return _Shape(pieces[::2], [int(number) for number in pieces[1::2]], found)


def _fill(
    shape: _Shape, values: dict[int, str], text: str, owners: list[int]
) -> tuple[list[Span], list[Span]] | None:
    """The slotted text's spans, and all contents, in the real text; None unless the slots, filled, give exactly
    that text."""
    slotted: list[int] = []  # where each literal starts, in the slotted text
    real: list[int] = []  # and in the real one
    contents: list[Span] = []
    at = there = 0
    for k, literal in enumerate(shape.literals):
        slotted.append(there)
        real.append(at)
        if not text.startswith(literal, at):
            return None
        at += len(literal)
        if k == len(shape.slots):
            break
        slot = shape.slots[k]
        there += len(literal) + len(slot_name(slot))
        following = shape.literals[k + 1]
        width = _width(values[slot], text, at, following)
        if width is None:
            return None
        if slot < len(owners):
            contents.append(Span(at, at + width, owners[slot]))
        at += width
    if at != len(text):
        return None

    def move(position: int) -> int:
        k = bisect_right(slotted, position) - 1
        return real[k] + min(position - slotted[k], len(shape.literals[k]))

    return [Span(move(s.start), move(s.end), s.message_index) for s in shape.spans], contents


def _width(value: str, text: str, at: int, following: str) -> int | None:
    """Characters of `value` at `at`, as it is or as in a JSON string (some templates write tool results
    so)."""
    if text.startswith(value, at) and text.startswith(following, at + len(value)):
        return len(value)
    for ascii_only in (False, True):
        escaped = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        if text.startswith(escaped, at) and text.startswith(following, at + len(escaped)):
            return len(escaped)
    return None


def _read_beginnings(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str
) -> list[Span]:
    """The trained spans from the real chat's beginnings alone, without slots."""
    messages = [as_dict(message) for message in chat.messages]
    turns = [Turn(m.role, "", "", (), None, bool(m.tool_calls)) for m in chat.messages]
    found = find_spans(template, tokenizer, chat, messages, turns, text)
    if isinstance(found, int):
        raise DataError(
            f"cannot tell which part of the text that the chat template ({template.name}) renders is message "
            f"{found + 1} ({chat.messages[found].role}); set train: false on it, or use a template with "
            "{% generation %} blocks",
            chat.place,
        )
    for span in found:
        message = chat.messages[span.message_index]
        said = text[span.start : span.end]
        for marker in (template.end_marker, template.final_marker):
            said = said.removesuffix(marker)
        if message.content.strip() and not message.tool_calls and not said.strip():
            raise DataError(
                f"the chat template ({template.name}) does not render message {span.message_index + 1}",
                chat.place,
            )
    return found
