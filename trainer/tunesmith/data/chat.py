"""Chats to tokens with labels. The loss falls on answers with their end markers, nowhere else.

A chat is tokenised once, as a whole; a token is labelled if any of its characters lies in a trained span.
So a token that straddles the beginning (prompt and answer in one token) or the end (the end marker and the
newline behind it) is learnt: the answer needs it. A character without a token of its own (white space that
the offsets leave out) counts to the token after it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

from tunesmith.data.chat_places import Span
from tunesmith.data.chat_resolve import resolve_template
from tunesmith.data.chat_spans import Layout, layout, spans
from tunesmith.data.chat_template import ChatTemplate, render
from tunesmith.data.encoded import Dropped
from tunesmith.errors import DataError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.examples import Chat, Message

__all__ = [
    "IGNORED",
    "ChatTemplate",
    "EncodedChat",
    "Span",
    "encode_chat",
    "prompt_ids",
    "reference",
    "render",
    "resolve_template",
    "spans",
]

IGNORED = -100


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """`labels[k]` is `input_ids[k]` where the loss falls and -100 elsewhere (not shifted). `reason` says what
    was left out where `truncated`; `partial`: the template itself leaves out a part of a trained message,
    such as its thoughts."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    reason: str | None = None
    partial: bool = False


@dataclass(frozen=True, slots=True)
class _Tokenised:
    """Token k covers the characters `extents[k]` = [start, end) of the layout's text."""

    layout: Layout
    ids: list[int]
    labels: list[int]
    extents: list[tuple[int, int]]

    @property
    def first_label(self) -> int:
        return next(k for k, label in enumerate(self.labels) if label != IGNORED)

    @property
    def needed(self) -> int:
        """Tokens up to the last labelled one."""
        return len(self.labels) - next(k for k, label in enumerate(reversed(self.labels)) if label != IGNORED)


def encode_chat(
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    max_length: int,
    truncation: Literal["cut", "drop"] = "cut",
) -> EncodedChat | Dropped:
    """The chat's tokens and labels, at most `max_length` tokens, at least one of them labelled.

    `cut` never leaves an answer without its end marker and never shortens an answer: it leaves out what
    comes after the last trained turn that fits. If not even the first fits, its prompt is shortened: the
    oldest turns go first (not the system's), then the middle of the longest remaining content, the system's
    last, then the beginning of what the template wrote. An answer longer than `max_length` drops the row,
    and so does a chat without a trained turn. DataError as `spans`; UserError for a tokenizer without
    offsets."""
    whole = _tokenise(template, tokenizer, chat)
    if whole is None:
        return Dropped("no message to train on")
    if len(whole.ids) <= max_length:
        return EncodedChat(whole.ids, whole.labels, partial=whole.layout.partial)
    if truncation == "drop":
        return Dropped("longer than max_length")
    return (
        _cut_later_turns(template, tokenizer, chat, whole, max_length)
        or _cut_older_turns(template, tokenizer, chat, whole, max_length)
        or Dropped("answer longer than max_length")
    )


def prompt_ids(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[int]:
    """Tokens of the chat up to its last answer, with the generation prompt; of all of it where it has
    none."""
    last = _last_answer(chat)
    asked = chat if last is None else replace(chat, messages=chat.messages[:last])
    text = render(template, tokenizer, asked, add_generation_prompt=True)
    return cast("list[int]", tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def reference(chat: Chat) -> str:
    """The last answer's text, which a generation from `prompt_ids` is compared with."""
    last = _last_answer(chat)
    if last is None:
        raise DataError("the chat has no answer to compare a generation with", chat.place)
    return chat.messages[last].content


def _last_answer(chat: Chat) -> int | None:
    return max((i for i, message in enumerate(chat.messages) if message.role == "assistant"), default=None)


def _tokenise(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> _Tokenised | None:
    """None where no token is trained."""
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer: {type(tokenizer).__name__} gives no character offsets, which label answers; "
            "use a fast tokenizer (tokenizer.json)"
        )
    laid = layout(template, tokenizer, chat)
    if not laid.spans:
        return None
    # the template writes the special tokens
    encoded = tokenizer(laid.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = cast("list[int]", encoded["input_ids"])
    labels = [IGNORED] * len(ids)
    extents: list[tuple[int, int]] = []
    covered = 0
    ahead = iter(laid.spans)
    span: Span | None = next(ahead)
    for k, (start, end) in enumerate(cast("list[tuple[int, int]]", encoded["offset_mapping"])):
        # several tokens of one character have equal offsets; trimmed ones leave their white space out
        if start > covered:
            start = covered
        if end > covered:
            covered = end
        extents.append((start, end))
        while span is not None and span.end <= start:
            span = next(ahead, None)
        if span is not None and span.start < end:
            labels[k] = ids[k]
    return _Tokenised(laid, ids, labels, extents) if labels.count(IGNORED) < len(labels) else None


def _cut_later_turns(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, chat: Chat, whole: _Tokenised, max_length: int
) -> EncodedChat | None:
    """The chat up to the last trained turn that fits; None if not even the first does."""
    ends = {span.message_index: span.end for span in whole.layout.spans}
    for index in sorted(ends, reverse=True):
        if sum(end <= ends[index] for _, end in whole.extents) > max_length:
            continue
        part = _tokenise(template, tokenizer, replace(chat, messages=chat.messages[: index + 1]))
        # rendered anew: what a template writes for a last turn can be longer than for an earlier one
        if part is not None and part.needed <= max_length:
            reason = "turns after the last answer that fits left out"
            return EncodedChat(
                part.ids[:max_length], part.labels[:max_length], True, reason, part.layout.partial
            )
    return None


def _cut_older_turns(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, chat: Chat, whole: _Tokenised, max_length: int
) -> EncodedChat | None:
    """The first trained answer with as much of its prompt as fits; None if it alone does not fit."""
    answer = whole.layout.spans[0].message_index
    head = next(i for i, message in enumerate(chat.messages) if message.role != "system" or i == answer)
    opening = chat.messages[:head]
    asked = [i for i in range(head, answer) if chat.messages[i].role == "user"] or [head]
    part: _Tokenised | None = None
    kept: tuple[Message, ...] = ()
    for begin in asked:
        kept = opening + chat.messages[begin : answer + 1]
        part = _tokenise(template, tokenizer, replace(chat, messages=kept))
        if part is not None and part.needed <= max_length:
            reason = "oldest turns of the prompt left out"
            return EncodedChat(
                part.ids[:max_length], part.labels[:max_length], True, reason, part.layout.partial
            )
    if part is None or part.needed - part.first_label > max_length:
        return None
    return _cut_prompt(part, kept, max_length)


def _cut_prompt(part: _Tokenised, messages: tuple[Message, ...], max_length: int) -> EncodedChat:
    """`part` without as many of its prompt's tokens as it is too long: from the middle of the longest content
    first, the system's last, then from the beginning of what is left. Never a part of a character."""
    excess = part.needed - max_length
    keep = [True] * part.needed
    pieces: list[tuple[bool, int, range]] = []
    for content in part.layout.contents:
        inside = [
            k
            for k in range(part.first_label)
            if content.start <= part.extents[k][0] and part.extents[k][1] <= content.end
        ]
        if inside:
            is_system = messages[content.message_index].role == "system"
            pieces.append((is_system, -len(inside), range(inside[0], inside[-1] + 1)))
    for _, _, piece in sorted(pieces, key=lambda piece: piece[:2]):
        if excess <= 0:
            break
        first = piece.start + max(len(piece) - excess, 0) // 2
        end = min(first + excess, piece.stop)
        while first > piece.start and part.extents[first][0] == part.extents[first - 1][0]:
            first -= 1
        while end < piece.stop and part.extents[end][0] == part.extents[end - 1][0]:
            end += 1
        keep[first:end] = [False] * (end - first)
        excess -= end - first
    for k in range(part.first_label):
        if excess <= 0:
            break
        excess -= keep[k]
        keep[k] = False
    ids = [token for token, kept in zip(part.ids, keep, strict=False) if kept]
    labels = [label for label, kept in zip(part.labels, keep, strict=False) if kept]
    return EncodedChat(ids, labels, True, "prompt cut", part.layout.partial)
