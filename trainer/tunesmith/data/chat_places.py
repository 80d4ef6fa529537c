"""Where a message stands in a rendered chat (chat_spans.py says by what rules)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from tunesmith.data.chat_template import TEMPLATE_ERRORS, ChatTemplate, draw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.examples import Chat, Message

SLOT = re.compile(r"zq(\d{5})slotqz")
_GENERATION = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of the rendered text that message `message_index` is trained on."""

    start: int
    end: int
    message_index: int


@dataclass(frozen=True, slots=True)
class Turn:
    """A message with slots: `lead` and `trail` are the content's text before its first and after its last
    slot, `slots` the numbers of the content's slots, `call` that of the first tool call's name."""

    role: str
    lead: str
    trail: str
    slots: tuple[int, ...]
    call: int | None
    has_calls: bool


def slot_name(number: int) -> str:
    return f"zq{number:05d}slotqz"


def is_trained(message: Message) -> bool:
    """Whether the loss falls on the message: its own `train`, else assistant turns only."""
    return message.role == "assistant" if message.train is None else message.train


def find_spans(
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    messages: list[dict[str, Any]],
    turns: list[Turn],
    whole: str,
) -> list[Span] | int:
    """The trained spans in `whole`, the rendering of `messages`; or the index of a message without a sure
    place."""
    source = template.source_for(chat)
    rendered: dict[tuple[int, bool], str | None] = {(len(messages), False): whole}

    def begin(count: int, prompt: bool) -> str | None:
        if (count, prompt) not in rendered:
            try:
                rendered[count, prompt] = draw(tokenizer, source, messages[:count], chat.tools, prompt)
            except TEMPLATE_ERRORS:  # an empty chat, or one that may not end here
                rendered[count, prompt] = None
        return rendered[count, prompt]

    blocks = _blocks(tokenizer, source, messages, chat.tools) if _GENERATION.search(source) else None
    found: list[Span] = []
    for i, message in enumerate(chat.messages):
        if not is_trained(message):
            continue
        place = _locate(template, whole, begin, turns, i)
        if place is None or (found and place[0] < found[-1].end):
            return i
        if blocks is None or message.train:
            found.append(Span(*place, i))
            continue
        marked = [block for block in blocks if block[0] < place[1] and place[0] < block[1]]
        found += [Span(start, end, i) for start, end in marked[:-1]]
        found += [Span(start, max(end, place[1]), i) for start, end in marked[-1:]]
    return found


def _blocks(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    messages: list[dict[str, Any]],
    tools: tuple[dict[str, Any], ...],
) -> list[tuple[int, int]]:
    """The characters that the template's `{% generation %}` blocks wrote."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _, blocks = render_jinja_template(
        conversations=[messages],
        tools=list(tools) or None,
        chat_template=source,
        return_assistant_tokens_mask=True,
        add_generation_prompt=False,
        **cast(Any, tokenizer.special_tokens_map),
    )
    return [(start, end) for start, end in cast(Any, blocks[0]) if start < end]


def _locate(
    template: ChatTemplate,
    whole: str,
    begin: Callable[[int, bool], str | None],
    turns: list[Turn],
    i: int,
) -> tuple[int, int] | None:
    """Characters [start, end) of message i in `whole`; None where there is doubt."""
    turn = turns[i]
    present = [slot for slot in map(slot_name, turn.slots) if slot in whole]
    if any(whole.count(slot) > 1 for slot in present):
        return None
    anchors = present or (
        [] if turn.call is None or slot_name(turn.call) not in whole else [slot_name(turn.call)]
    )
    if not anchors and (turn.slots or turn.call is not None):
        return None
    first = whole.index(anchors[0]) if anchors else None
    start = _start(whole, begin, turn, i, first)
    if start is None and first is not None and present:  # the content's own beginning
        lead = turn.lead if whole.endswith(turn.lead, 0, first) else turn.lead.lstrip()
        start = first - len(lead) if whole.endswith(lead, 0, first) else first
    if start is None:
        return None
    after_content = whole.index(anchors[-1]) + len(anchors[-1]) if anchors else start
    mine = {slot_name(slot) for slot in (*turn.slots, *([] if turn.call is None else [turn.call]))}
    foreign = [m.start() for m in SLOT.finditer(whole, start) if m[0] not in mine]
    if foreign and foreign[0] < after_content:
        return None
    tail = whole[after_content : foreign[0] if foreign else len(whole)]
    cut = begin(i + 1, False)
    closing = None
    if cut is not None and anchors and anchors[-1] in cut:
        closing = _common(template, tail, cut.split(anchors[-1], 1)[1])
    elif cut is not None and not anchors and cut.startswith(whole[:start]):
        closing = _common(template, tail, cut[start:])
    elif anchors and sum(tail.count(m) for m in {template.end_marker, template.final_marker} if m) <= 1:
        closing = tail
    if closing is None:
        return None
    length = _closing_length(template, closing, turns, i)
    return None if length is None else (start, after_content + length)


def _start(
    whole: str, begin: Callable[[int, bool], str | None], turn: Turn, i: int, first: int | None
) -> int | None:
    """Where the generation of message i would start: the end of the generation prompt for it. `first` is its
    first slot's position in `whole`."""
    prompt = begin(i, True) if turn.role == "assistant" else None
    if prompt is None:
        return None
    if whole.startswith(prompt) and (first is None or len(prompt) <= first):
        return len(prompt)
    # earlier turns are rendered otherwise once later ones follow: look for what the prompt ends with
    bare = begin(i, False)
    if first is None or bare is None or not prompt.startswith(bare) or prompt == bare:
        return None
    header = prompt[len(bare) :]
    floor = max((m.end() for m in SLOT.finditer(whole, 0, first)), default=0)
    at = whole.rfind(header, floor, first)
    return None if at < 0 else at + len(header)


def _closing_length(template: ChatTemplate, closing: str, turns: list[Turn], i: int) -> int | None:
    """How much of `closing`, the template's text from message i's content to the turn's end, belongs to the
    message: its tool calls and the end marker. None where a marker is due and missing."""
    turn = turns[i]
    markers = [marker for marker in (template.end_marker, template.final_marker) if marker]
    trail = turn.trail if closing.startswith(turn.trail) else turn.trail.rstrip()
    own = len(trail.rstrip()) if closing.startswith(trail) else 0
    if turn.role != "assistant":
        after = closing[own:].lstrip()
        marked = next((m.strip() for m in markers if after.startswith(m.strip())), None)
        return own if marked is None else closing.index(marked, own) + len(marked)
    plain = bool(turn.slots) and not turn.has_calls  # then `closing` is the template's own text alone
    for marker in markers:
        at = closing.find(marker) if plain else closing.rfind(marker)
        if plain and at >= 0:
            return at + len(marker)
        if at >= 0 and not template.tokens.sub("", closing[at + len(marker) :]).strip():
            return at + len(marker)
    written = closing.rstrip()
    if turn.has_calls or any(token.end() == len(written) for token in template.tokens.finditer(written)):
        return len(written)
    followed = turns[i + 1].role if i + 1 < len(turns) else None
    if followed == "assistant" or (followed is not None and not template.end_marker):
        return own if turn.slots else len(written)
    return None


def _common(template: ChatTemplate, one: str, other: str) -> str:
    """The longest common beginning, whole tokens of the tokenizer's added ones."""
    differ = (k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    end = next(differ, min(len(one), len(other)))
    for text in (one, other):
        end = min([end, *(m.start() for m in template.tokens.finditer(text) if m.start() < end < m.end())])
    return one[:end]
