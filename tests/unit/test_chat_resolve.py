"""Which template a run uses: the tokenizer's, a shipped one, a file; and where a generation stops."""

from __future__ import annotations

from pathlib import Path

import pytest

from chat_templates import ALPACA, CHATML, chat, tokenizer
from tunesmith.data.chat import prompt_ids, render, resolve_template, spans
from tunesmith.errors import UserError


def test_resolve_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chat_template: nowhere.jinja: no such file"):
        resolve_template(tokenizer(None), "nowhere.jinja")
    silent = tmp_path / "silent.jinja"
    silent.write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(UserError, match="does not render the content of an assistant"):
        resolve_template(tokenizer(None), str(silent))
    silent.write_text("{% for m in messages %}{{ m.content }")
    with pytest.raises(UserError, match="does not render a question and its answer"):
        resolve_template(tokenizer(None), str(silent))
    endless = tmp_path / "endless.jinja"
    endless.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    with pytest.raises(UserError, match="no end marker after an answer and the tokenizer has no eos"):
        resolve_template(tokenizer(None, eos=None), str(endless))
    with pytest.raises(UserError, match="none ends answers with the tokenizer's eos, which it lacks"):
        resolve_template(tokenizer(None, eos=None), "none")


def test_a_template_without_header_and_end_marker_gets_both() -> None:
    tokens = tokenizer(ALPACA)
    template = resolve_template(tokens, None)
    row = chat(("u", "q"), ("a", "one"), ("u", "q"), ("a", "two"))
    text, found = spans(template, tokens, row)
    assert [text[s.start : s.end] for s in found] == ["one", "two\n\n</s>"]
    asked = render(template, tokens, chat(("u", "q")), add_generation_prompt=True)
    assert asked == "### Instruction:\nq\n\n### Response:\n"
    assert template.stop_token_ids == (tokens.eos_token_id,)
    assert "eos </s> is added" in template.note
    assert "### Response" in template.note
    # the source says it all: exported, it renders the same
    tokens.chat_template = template.source
    assert resolve_template(tokens, None).source == template.source


def test_chatml_where_the_tokenizer_knows_it() -> None:
    tokens = tokenizer(None)
    template = resolve_template(tokens, None)
    assert template.note == "the tokenizer has no chat template: ChatML is used"
    rendered, found = spans(template, tokens, chat(("s", "x"), ("u", "q"), ("a", "b")))
    assert rendered == tokenizer(CHATML).apply_chat_template(
        [{"role": r, "content": c} for r, c in (("system", "x"), ("user", "q"), ("assistant", "b"))],
        tokenize=False,
    )
    assert [rendered[s.start : s.end] for s in found] == ["b<|im_end|>"]
    assert template.stop_token_ids == (tokens.convert_tokens_to_ids("<|im_end|>"), tokens.eos_token_id)
    assert template.stop_strings == ()


def test_chatml_as_ordinary_text_ends_with_eos() -> None:
    tokens = tokenizer(CHATML, special="</s>")
    template = resolve_template(tokens, "chatml")
    assert "answer ends with <|im_end|></s>" in template.note
    rendered, found = spans(template, tokens, chat(("u", "q"), ("a", "b"), ("u", "q"), ("a", "b")))
    assert [rendered[s.start : s.end] for s in found] == ["b<|im_end|></s>"] * 2
    assert rendered.startswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")
    assert template.stop_token_ids == (tokens.eos_token_id,)
    # the tokenizer's own ChatML is taken as it is: the text stops the generation
    own = resolve_template(tokens, None)
    assert own.stop_strings == ("<|im_end|>",)
    assert own.note == "the tokenizer's own chat template"


def test_chatml_writes_tools_and_their_calls() -> None:
    tokens = tokenizer(None)
    template = resolve_template(tokens, None)
    calls = ({"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}},)
    tools = ({"type": "function", "function": {"name": "look"}},)
    row = chat(("s", "sys"), ("u", "q"), ("a", "", None, calls), ("t", "seen"), ("a", "done"), tools=tools)
    rendered, found = spans(template, tokens, row)
    assert rendered.count("<|im_start|>system\nsys\n\n") == rendered.count("<|im_start|>system") == 1
    assert '<tools>\n{"type": "function", "function": {"name": "look"}}\n</tools><|im_end|>' in rendered
    first = '<tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call><|im_end|>'
    assert [rendered[s.start : s.end] for s in found] == [first, "done<|im_end|>"]


def test_a_tokenizer_with_a_second_template_for_tools() -> None:
    tokens = tokenizer(None)
    tokens.chat_template = {"default": CHATML, "tool_use": "{{ 'T:' ~ tools[0].name ~ '\n' }}" + CHATML}
    template = resolve_template(tokens, None)
    turns = ("u", "q"), ("a", "b")
    plain, _ = spans(template, tokens, chat(*turns))
    with_tools, found = spans(template, tokens, chat(*turns, tools=({"name": "look"},)))
    assert with_tools == "T:look\n" + plain
    assert [with_tools[s.start : s.end] for s in found] == ["b<|im_end|>"]
    tokens.chat_template = {"tool_use": CHATML}
    with pytest.raises(UserError, match="chat_template: "):
        resolve_template(tokens, None)


def test_no_template_at_all() -> None:
    tokens = tokenizer(CHATML)
    template = resolve_template(tokens, "none")
    rendered, found = spans(
        template, tokens, chat(("u", "Q: 1+1?\nA:"), ("a", " 2"), ("u", "\nQ?"), ("a", " 3"))
    )
    assert rendered == "Q: 1+1?\nA: 2</s>\nQ? 3</s>"
    assert [rendered[s.start : s.end] for s in found] == [" 2</s>", " 3</s>"]
    assert tokens.decode(prompt_ids(template, tokens, chat(("u", "Q:"), ("a", "x")))) == "Q:"
