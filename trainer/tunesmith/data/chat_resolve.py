"""Which template a run uses, and where a generation by it stops.

What a template leaves out and training needs (an end after the answer, a header before it) is added to its
source, so that the source alone says how text is rendered, in training, in evaluation and after export.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import Environment

from tunesmith.data.chat_template import TEMPLATE_ERRORS, ChatTemplate, draw
from tunesmith.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TESTING_METHODS = frozenset(
    ("split", "rsplit", "partition", "startswith", "endswith", "find", "rfind", "index", "replace")
)


def resolve_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> ChatTemplate:
    """The template of a run: `choice` is the recipe's `model.chat_template`.

    None: the tokenizer's own, else ChatML. "chatml": the shipped ChatML; with a tokenizer that has no
    <|im_end|> token an answer ends with that text *and* the tokenizer's eos, so that any generator stops.
    "none": contents one after the other, each answer followed by eos. Else the path of a Jinja file. The
    shipped templates write the bos that the tokenizer puts before plain text; all others are taken as they
    stand.

    Raises UserError if the file is missing, the template does not render a question with its answer, or an
    eos is needed that the tokenizer lacks.
    """
    own: Any = tokenizer.chat_template
    match choice:
        case None if own:
            source, tool_source = _own_sources(tokenizer)
            return _complete(tokenizer, "tokenizer", source, tool_source, "the tokenizer's own chat template")
        case None | "chatml":
            note = "ChatML" if choice else "the tokenizer has no chat template: ChatML is used"
            source, how = _chatml(tokenizer)
            return _complete(tokenizer, "chatml", source, source, note + how)
        case "none":
            if tokenizer.eos_token is None:
                raise UserError(
                    "chat_template: none ends answers with the tokenizer's eos, which it lacks; use chatml"
                )
            source = _leading_bos(tokenizer) + _shipped("plain.jinja")
            return _complete(
                tokenizer, "none", source, source, "no chat template: contents, answers end with eos"
            )
        case path:
            if not Path(path).is_file():
                raise UserError(
                    f"chat_template: {path}: no such file; use chatml, none or the path of a .jinja file"
                )
            source = Path(path).read_text(encoding="utf-8")
            return _complete(tokenizer, path, source, source, f"chat template of {path}")


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches any token that is cut out of the text before the tokenizer's own splitting (special or
    added)."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    return re.compile("|".join(map(re.escape, _longest_first(texts))) or "(?!)")


def _longest_first(texts: set[str]) -> list[str]:
    return sorted(texts, key=lambda text: (-len(text), text))


def _own_sources(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    try:
        plain = tokenizer.get_chat_template()
        return plain, tokenizer.get_chat_template(tools=[{}])
    except ValueError as error:  # several named templates, none of them the default
        raise UserError(f"chat_template: {str(error).splitlines()[0]}") from error


def _shipped(name: str) -> str:
    return files("tunesmith.data").joinpath("templates", name).read_text(encoding="utf-8")


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    bos = tokenizer.bos_token_id
    # asked of the tokenizer, since no attribute says it for all classes
    return "{{- bos_token }}" if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else ""


def _chatml(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    source = _shipped("chatml.jinja")
    bos = _leading_bos(tokenizer)
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if {"<|im_start|>", "<|im_end|>"} <= known:
        return bos + source, ""
    how = "; the tokenizer has no <|im_start|> and <|im_end|> tokens, so they are ordinary text"
    if tokenizer.eos_token is None:
        return bos + source, how
    ending = "{%- set answer_end = '<|im_end|>' + eos_token %}"
    return bos + ending + source, f"{how}, and an answer ends with <|im_end|>{tokenizer.eos_token}"


@dataclass(frozen=True, slots=True)
class _Probe:
    """What a template writes around answers: `between` one and the next question (None: it takes no second
    turn), `last` after the last; `header` before an answer, where add_generation_prompt does not write it;
    `opened`: what the generation prompt begins of the answer itself, e.g. <think>."""

    between: str | None
    last: str
    header: str
    opened: str


def _complete(
    tokenizer: PreTrainedTokenizerBase, name: str, source: str, tool_source: str, note: str
) -> ChatTemplate:
    probe = _probe(tokenizer, name, source)
    added = _added_tokens(tokenizer)
    eos = cast("str | None", tokenizer.eos_token)
    addition = ""
    if probe.header:
        written = json.dumps(probe.header, ensure_ascii=False)
        addition += f"{{{{ {written} if add_generation_prompt else '' }}}}"
        note += f"; it has no generation prompt: {probe.header!r} is used"
    final = _closing(probe.last, added)
    if not final:
        if eos is None:
            raise UserError(
                f"chat_template: {name} writes no end marker after an answer and the tokenizer has no eos: "
                "generation could not stop; write a marker after the assistant's content"
            )
        addition += (
            "{{ eos_token if not add_generation_prompt and messages[-1]['role'] == 'assistant' else '' }}"
        )
        note += f"; it writes nothing after the last answer: the eos {eos} is added"
        final = probe.last + eos
    if probe.between is None or probe.between.startswith(final):
        end = final
    elif eos is not None and probe.between.lstrip().startswith(eos):
        end = probe.between[: probe.between.index(eos) + len(eos)]
    else:
        end = ""
        note += "; answers before the last one have no end marker"
    markers = dict.fromkeys(marker for marker in (end, final) if marker)
    stops = [token for marker in markers for token in added.findall(marker)]
    ids = cast("list[int]", tokenizer.convert_tokens_to_ids(stops))
    if tokenizer.eos_token_id is not None:
        ids.append(cast(int, tokenizer.eos_token_id))
    looked_for = {*_looked_for(source), *_looked_for(tool_source), *filter(None, [probe.opened])}
    sources = [source, tool_source]
    if addition:  # Jinja itself drops one newline at a source's end
        sources = [text.removesuffix("\n") + addition for text in sources]
    return ChatTemplate(
        name=name,
        source=sources[0],
        tool_source=sources[1],
        end_marker=end,
        final_marker=final,
        stop_token_ids=tuple(dict.fromkeys(ids)),
        stop_strings=tuple(marker.strip() for marker in markers if added.search(marker) is None),
        note=note,
        looked_for=tuple(_longest_first(looked_for)),
        tokens=added,
    )


def _probe(tokenizer: PreTrainedTokenizerBase, name: str, source: str) -> _Probe:
    marks = ["zqfirstquestionqz", "zqfirstanswerqz", "zqsecondquestionqz", "zqsecondansweraqz"]
    roles = ["user", "assistant"] * 2
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    opening: list[dict[str, str]] = []
    try:
        one = draw(tokenizer, source, turns[:2], (), False)
    except TEMPLATE_ERRORS as error:
        opening = [{"role": "system", "content": "zqsystemqz"}]
        try:
            one = draw(tokenizer, source, opening + turns[:2], (), False)
        except TEMPLATE_ERRORS:
            raise UserError(
                f"chat_template: {name} does not render a question and its answer: {error}"
            ) from error
    if marks[1] not in one:
        raise UserError(f"chat_template: {name} does not render the content of an assistant message")
    before, last = one.split(marks[1], 1)
    between: str | None = None
    header = opened = ""
    try:
        two = draw(tokenizer, source, opening + turns, (), False)
        between = two.split(marks[1], 1)[1].split(marks[2], 1)[0]
        last = two.split(marks[3], 1)[1]
    except (*TEMPLATE_ERRORS, IndexError):
        pass
    try:
        asked = draw(tokenizer, source, opening + turns[:1], (), False)
        prompted = draw(tokenizer, source, opening + turns[:1], (), True)
        if asked == prompted and before.startswith(asked):
            header = before[len(asked) :].rstrip(" ")
        elif prompted.startswith(before):
            opened = prompted[len(before) :].strip()
    except TEMPLATE_ERRORS:
        pass
    return _Probe(between, last, header if header.strip() else "", opened)


def _closing(tail: str, added: re.Pattern[str]) -> str:
    """The end marker at the front of what follows an answer: through its first added token, else all its
    text."""
    token = added.search(tail)
    return tail[: token.end()] if token else tail.rstrip()


def _looked_for(source: str) -> set[str]:
    """String constants that the template's code tests a text for, or splits or replaces by."""
    tokens = [(kind, text) for _, kind, text in Environment().lex(source) if kind != "whitespace"]
    found: set[str] = set()
    for k, (kind, text) in enumerate(tokens):
        if kind != "string":
            continue
        before, after = tokens[max(k - 2, 0) : k], tokens[k + 1 : k + 3]
        called = len(before) == 2 and before[1][1] == "(" and before[0][1] in _TESTING_METHODS
        tested = after[:1] == [("name", "in")] or after == [("name", "not"), ("name", "in")]
        if called or tested:
            found.add(cast(str, ast.literal_eval(text)))
    return {text for text in found if text.strip()}
