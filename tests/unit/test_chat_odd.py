"""Chats and templates that are odd: answers found all the same, or an error that names the row."""

from __future__ import annotations

import re

import pytest

from chat_templates import CHATML, LLAMA2, PHI, QWEN3, TOOLS, call, chat, style_tokenizer, tokenizer, trained
from tunesmith.data.chat import resolve_template, spans
from tunesmith.data.chat_spans import layout
from tunesmith.data.examples import Chat
from tunesmith.errors import DataError


def test_merged_turns() -> None:
    source = """{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}
{{- '\\n\\n' + m.content }}{% else %}{{ '</s>' if loop.index0 else '' }}{{ '<|' + m.role + '|>' + m.content }}
{%- endif %}{% endfor %}{{ '</s>' }}{{ '<|assistant|>' if add_generation_prompt else '' }}"""
    row = chat(("u", "q"), ("u", "q"), ("a", "one"), ("a", "two"), ("u", "q"), ("a", "one"))
    assert trained(tokenizer(source), row) == ["one", "two</s>", "one</s>"]


def test_a_template_that_rewrites_contents() -> None:
    tokens = tokenizer(CHATML.replace("m.content", "m.content.split() | join(' ')"))
    row = chat(("u", "q"), ("a", "one  two"), ("u", "q  q"), ("a", "three\nfour"))
    assert trained(tokens, row) == ["one two<|im_end|>", "three four<|im_end|>"]


def test_a_tool_result_written_as_json_keeps_the_answers() -> None:
    tokens = tokenizer(
        CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' else m.content | tojson }}")
    )
    row = chat(("u", "q"), ("a", "one"), ("t", '{"a": "b\n"}\\'), ("a", "two"))
    template = resolve_template(tokens, None)
    assert trained(tokens, row) == ["one<|im_end|>", "two<|im_end|>"]
    assert len(layout(template, tokens, row).contents) == 4
    row = chat(("u", "q"), ("t", "a\\"), ("a", "two"))
    assert len(layout(template, tokens, row).contents) == 3


def test_a_doubtful_row_is_an_error_that_names_it() -> None:
    twice = tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content.split() | join(' ') }}"))
    with pytest.raises(DataError, match=re.escape("chats.jsonl:7: cannot tell which part")):
        spans(resolve_template(twice, None), twice, chat(("u", "q  q", True), ("a", "b")))
    hides = tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content if m.content != 'b' else '' }}"))
    with pytest.raises(DataError, match=r"chats.jsonl:7: .* does not render message 2"):
        spans(resolve_template(hides, None), hides, chat(("u", "q"), ("a", "b")))


def test_a_template_that_refuses_the_chat() -> None:
    tokens = tokenizer(LLAMA2, bos="<s>")
    with pytest.raises(DataError, match=r"chats.jsonl:7: .* refuses this chat: roles must alternate"):
        spans(resolve_template(tokens, None), tokens, chat(("u", "q"), ("u", "q"), ("a", "b")))


@pytest.mark.parametrize(("row", "what"), [
    (chat(("u", "q"), ("a", "", None, call("look"))), "tool_calls"),
    (chat(("u", "q"), ("a", "b"), tools=TOOLS), "tools"),
])  # fmt: skip
def test_tools_that_the_template_ignores(row: Chat, what: str) -> None:
    tokens = tokenizer(PHI)
    with pytest.raises(DataError, match=f"chats.jsonl:7: .* does not render {what}"):
        spans(resolve_template(tokens, None), tokens, row)


def test_a_remembered_shape_gives_the_same_spans() -> None:
    tokens = tokenizer(QWEN3, eos="<|im_end|>")
    used = resolve_template(tokens, None)
    rows = [
        chat(("u", "q"), ("a", text), ("u", "q"), ("a", text * 3))
        for text in ("one", "a\nlonger", "one ", "x")
    ]
    for row in rows:
        assert spans(used, tokens, row) == spans(resolve_template(tokens, None), tokens, row)
    assert len(used.cache) == 2  # "one " has a shape of its own


def test_a_rewritten_answer_that_holds_the_end_marker() -> None:
    tokens = tokenizer(PHI.replace("m.content", "m.content.split() | join(' ')"), eos="<|endoftext|>")
    row = chat(("u", "q"), ("a", "a  <|end|>\nb"), ("u", "q  q"), ("a", "c  <|end|>"))
    assert trained(tokens, row) == ["a <|end|> b<|end|>", "c <|end|><|end|>"]


def test_an_answer_that_the_template_writes_twice() -> None:
    title = "{{ '# ' + messages[-1].content + '\n' }}"
    tokens = tokenizer(title + CHATML)
    with pytest.raises(DataError, match="cannot tell which part"):
        spans(resolve_template(tokens, None), tokens, chat(("u", "q"), ("a", "b")))


def test_a_content_that_begins_or_ends_with_what_the_template_looks_for() -> None:
    row = chat(("u", "<think> why </think>", True), ("a", "b"))
    assert trained(style_tokenizer("qwen3"), row)[0] == "<think> why </think><|im_end|>"
    # a test in an `if` alone counts too: contents keep their places
    tokens = tokenizer(
        CHATML.replace("{{ m.content }}", "{{ 'seen: ' if 'SECRET' in m.content }}{{ m.content }}")
    )
    row = chat(("u", "a SECRET"), ("a", "b"))
    assert [
        content.message_index for content in layout(resolve_template(tokens, None), tokens, row).contents
    ] == [0, 1]


def test_calls_that_leave_the_turn_open() -> None:
    source = """{% for m in messages %}{% if m.role == 'tool' %}{{ '[result]' + m.content }}{% else %}
{{- '<|' + m.role + '|>' + m.content }}{% for c in m.tool_calls or [] %}{{ '[call]' + c.function.name + '[/call]' }}
{%- endfor %}{{ '</s>' if not m.tool_calls }}{% endif %}{% endfor %}
{{- '<|assistant|>' if add_generation_prompt }}"""
    row = chat(("u", "q"), ("a", "hm", None, call("look")), ("t", "x"), ("a", "done"))
    tokens = tokenizer(source)
    text, found = spans(resolve_template(tokens, None), tokens, row)
    assert [text[s.start : s.end] for s in found] == ["hm[call]look[/call]", "done</s>"]
