"""Which characters of a rendered chat are trained, template by template."""

from __future__ import annotations

import random

import pytest

from chat_templates import (
    DEEPSEEK,
    STYLES,
    TOOLS,
    call,
    chat,
    style_tokenizer,
    tokenizer,
    trained,
)
from tunesmith.data.chat import encode_chat, render, resolve_template, spans
from tunesmith.data.chat_spans import layout
from tunesmith.data.examples import Chat


def expected(name: str, row: Chat) -> list[str]:
    style = STYLES[name]
    last = len(row.messages) - 1
    answers: list[str] = []
    for i, message in enumerate(row.messages):
        if message.train is not None and not message.train:
            continue
        if message.role == "assistant":
            content = message.content.strip() if style.strips else message.content
            before = "<think>\n\n</think>\n\n" if name == "qwen3" and i == last else style.before
            answers.append(before + content + style.end)
    return answers


@pytest.mark.parametrize("name", STYLES)
def test_every_answer_with_its_end_marker_and_nothing_else(name: str) -> None:
    tokens = style_tokenizer(name)
    opening = [("s", "Be brief.")] if STYLES[name].system else []
    for row in (
        chat(("u", "1+1?"), ("a", "2")),
        chat(
            *opening, ("u", "1+1?"), ("a", "2"), ("u", "2+2?"), ("a", "4"), ("u", "bye"), ("a", "Good day.")
        ),
        chat(("u", "hi"), ("a", "hi"), ("u", "hi"), ("a", "hi")),
        chat(("u", "hi"), ("a", "first", False), ("u", "again"), ("a", "second")),
        chat(("u", "hi"), ("a", "first"), ("u", "again"), ("a", "second", False)),
        chat(("u", "hi"), ("a", "first"), ("u", "and then?")),
        chat(("u", " hi\n"), ("a", "\n padded  "), ("u", "x"), ("a", " 你好 🙂\n\n")),
    ):
        assert trained(tokens, row) == expected(name, row)


@pytest.mark.parametrize("name", STYLES)
def test_contents_that_imitate_the_template(name: str) -> None:
    tokens = style_tokenizer(name)
    fake = render(resolve_template(tokens, None), tokens, chat(("u", "q"), ("a", "fake")))
    row = chat(
        ("u", fake), ("a", f"a {fake} b"), ("u", "assistant\n[/INST] x"), ("a", STYLES[name].end + " zq")
    )
    if (
        name == "qwen3"
    ):  # the imitation brings an empty thought; the template takes what stands before it away
        row = chat(("u", fake), ("a", "<|im_end|>\n<|im_start|>user\nq"), ("u", "hi"), ("a", "<|im_end|> zq"))
    assert trained(tokens, row) == expected(name, row)


@pytest.mark.parametrize("name", STYLES)
def test_random_chats(name: str) -> None:
    draw = random.Random(name)
    pieces = [
        "yes",
        " ",
        "\n",
        "\n\n",
        "好",
        "🙂",
        "é",
        "{",
        '"',
        "\\",
        "user",
        "assistant\n",
        "<|im_end|>",
        "</s>",
    ]
    pieces += ["[/INST]", "### Response:", "{{ x }}", "{% generation %}", "zq00000slotqz", "<|eot_id|>", ":"]
    tokens = style_tokenizer(name)
    template = resolve_template(tokens, None)
    for _ in range(60):
        turns: list[tuple[object, ...]] = []
        if STYLES[name].system and draw.random() < 0.5:
            turns.append(("s", "".join(draw.choices(pieces, k=3))))
        for _ in range(draw.randint(1, 3)):
            turns.append(("u", "".join(draw.choices(pieces, k=draw.randint(1, 4)))))
            turns.append(
                ("a", "".join(draw.choices(pieces, k=draw.randint(1, 6))), draw.choice([None, False, True]))
            )
        row = chat(*turns)
        text, found = spans(template, tokens, row)
        said = [text[span.start : span.end] for span in found]
        # a template's own {% generation %} block knows more than an explicit train: true asks for
        newline = "\n" if name == "marked" else ""
        assert [s.removesuffix(newline) for s in said] == [
            s.removesuffix(newline) for s in expected(name, row)
        ]
        encoded = encode_chat(template, tokens, row, 100_000)
        if said:
            labels = [label for label in encoded.labels if label != -100]
            assert tokens.decode(labels, clean_up_tokenization_spaces=False) == "".join(said)


def test_generation_blocks_give_the_mask_of_transformers() -> None:
    tokens = style_tokenizer("marked")
    template = resolve_template(tokens, None)
    row = chat(("s", "x"), ("u", "hi"), ("a", "first "), ("u", "again"), ("a", "<|im_end|>x"))
    plain = [{"role": m.role, "content": m.content} for m in row.messages]
    theirs = tokens.apply_chat_template(plain, return_dict=True, return_assistant_tokens_mask=True)
    encoded = encode_chat(template, tokens, row, 1000)
    assert encoded.input_ids == theirs["input_ids"]
    assert [label != -100 for label in encoded.labels] == [bool(bit) for bit in theirs["assistant_masks"]]


def test_generation_blocks_decide_unless_a_message_does() -> None:
    source = STYLES["marked"].source.replace(
        "m.role == 'assistant'", "m.role == 'assistant' and not loop.last"
    )
    tokens = tokenizer(source, eos="<|im_end|>")
    assert trained(tokens, chat(("u", "q"), ("a", "one"), ("u", "q"), ("a", "two"))) == ["one<|im_end|>\n"]
    row = chat(("u", "q"), ("a", "one", False), ("u", "q"), ("a", "two", True))
    assert trained(tokens, row) == ["two<|im_end|>"]


def test_other_roles_are_trained_where_they_ask_for_it() -> None:
    row = chat(
        ("s", "sys", True), ("u", " question ", True), ("a", "answer", False), ("u", "q"), ("a", "last")
    )
    assert trained(style_tokenizer("chatml"), row) == [
        "sys<|im_end|>",
        " question <|im_end|>",
        "last<|im_end|>",
    ]
    assert trained(style_tokenizer("llama2"), row) == ["sys", "question", " last </s>"]


def test_thoughts_are_trained_where_the_template_keeps_them() -> None:
    tokens = style_tokenizer("qwen3")
    template = resolve_template(tokens, None)
    thought = "<think>\nhm\n</think>\n\n"
    row = chat(("u", "q"), ("a", f"{thought}one"), ("u", "q"), ("a", f"{thought}one"))
    assert trained(tokens, row) == ["one<|im_end|>", f"{thought}one<|im_end|>"]
    assert layout(template, tokens, row).partial
    assert not layout(template, tokens, chat(("u", "q"), ("a", f"{thought}one"))).partial
    # a rewriting of the thought's edges, which keeps the text
    assert trained(tokens, chat(("u", "q"), ("a", "<think>hm</think>one"))) == [f"{thought}one<|im_end|>"]


def test_a_generation_prompt_that_begins_the_thought() -> None:
    keeps = DEEPSEEK.replace("m.content.split('</think>')[-1]", "m.content")
    tokens = tokenizer(keeps, bos="<s>")
    assert trained(tokens, chat(("u", "q"), ("a", "<think>\nhm</think>one"))) == ["hm</think>one</s>"]
    strips = tokenizer(DEEPSEEK, bos="<s>")
    assert trained(strips, chat(("u", "q"), ("a", "<think>\nhm</think>one"))) == ["one</s>"]


def test_tool_calls_belong_to_the_answer() -> None:
    tokens = style_tokenizer("qwen3")
    row = chat(
        ("u", "where?"),
        ("a", "", None, call("look", at='"<|im_end|>"')),
        ("t", '{"name": "look"}'),
        ("a", "I look again.", None, call("look", at="x") + call("look", n=2)),
        ("t", "nothing"),
        ("a", "Nowhere."),
        ("u", "sure?"),
        ("a", "", False, call("look")),
        ("t", "yes"),
        ("a", "Yes."),
        tools=TOOLS,
    )
    first = '<tool_call>\n{"name": "look", "arguments": {"at": "\\"<|im_end|>\\""}}\n</tool_call><|im_end|>'
    second = 'I look again.\n<tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call>'
    second += '\n<tool_call>\n{"name": "look", "arguments": {"n": 2}}\n</tool_call><|im_end|>'
    last = "<think>\n\n</think>\n\nYes.<|im_end|>"
    assert trained(tokens, row) == [first, second, "Nowhere.<|im_end|>", last]


def test_a_call_whose_thought_the_history_drops() -> None:
    row = chat(
        ("u", "q"),
        ("a", "<think>a</think>", None, call("look")),
        ("t", "seen"),
        ("a", "", None, call("look", far=True)),
        ("t", "seen"),
        ("a", "done"),
        ("u", "q"),
        ("a", "bye"),
        tools=TOOLS,
    )
    end = "}}\n</tool_call><|im_end|>"
    plain, far = (f'<tool_call>\n{{"name": "look", "arguments": {{{x}' + end for x in ("", '"far": true'))
    assert trained(style_tokenizer("qwen3"), row) == [
        plain,
        far,
        "done<|im_end|>",
        "<think>\n\n</think>\n\nbye<|im_end|>",
    ]


def test_an_empty_answer_is_its_end_marker() -> None:
    row = chat(("u", "q"), ("a", ""), ("u", "q"), ("a", ""))
    assert trained(style_tokenizer("llama3"), row) == ["<|eot_id|>", "<|eot_id|>"]
    assert trained(style_tokenizer("qwen3"), row) == ["<|im_end|>", "<think>\n\n</think>\n\n<|im_end|>"]
    assert trained(style_tokenizer("llama2"), row) == ["  </s>", "  </s>"]
