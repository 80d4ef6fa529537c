"""Chats to tokens with labels: whole, shortened, as prompts."""

from __future__ import annotations

from collections import Counter

import pytest
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from chat_templates import CHATML, LLAMA2, LLAMA3, MARKED, STYLES, chat, style_tokenizer, tokenizer
from tunesmith.data.chat import EncodedChat, encode_chat, prompt_ids, reference, resolve_template
from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import Chat
from tunesmith.errors import DataError, UserError

LONG = chat(
    ("s", "sys"), ("u", "one one"), ("a", "1"), ("u", "two two"), ("a", "22"), ("u", "three"), ("a", "333")
)


def text(tokens: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokens.decode([token for token in ids if token != -100], clean_up_tokenization_spaces=False)


def encoded(tokens: PreTrainedTokenizerFast, row: Chat, max_length: int = 10_000) -> EncodedChat:
    result = encode_chat(resolve_template(tokens, None), tokens, row, max_length)
    assert isinstance(result, EncodedChat)
    assert len(result.input_ids) == len(result.labels) <= max_length
    assert all(label in (-100, token) for token, label in zip(result.input_ids, result.labels, strict=True))
    return result


def test_special_tokens_are_written_once() -> None:
    tokens = tokenizer(LLAMA3, bos="<s>")
    tokens.add_bos_token = True
    tokens.update_post_processor()
    assert tokens("x")["input_ids"][0] == tokens.bos_token_id
    ids = encoded(tokens, chat(("u", "q"), ("a", "b"))).input_ids
    assert ids.count(tokens.bos_token_id) == 1
    # a shipped template writes the bos that the tokenizer itself would put there, and only that
    for choice in ("none", "chatml"):
        assert (
            encode_chat(resolve_template(tokens, choice), tokens, LONG, 1000).input_ids[0]
            == tokens.bos_token_id
        )
        without = tokenizer(None, bos="<s>")
        ids = encode_chat(resolve_template(without, choice), without, LONG, 1000).input_ids
        assert without.bos_token_id not in ids


def test_tokens_that_straddle_an_edge_are_trained() -> None:
    tokens = tokenizer(
        CHATML.replace("assistant\n{% endif", "assistant\n{% endif"), special="</s>", merges=True
    )
    result = encoded(tokens, chat(("u", "What?"), ("a", "I think the answer is seven.")))
    pieces = [tokens.decode([label]) for label in result.labels if label != -100]
    assert pieces[0].endswith("I think")
    assert len(pieces[0]) > len("I think")
    assert pieces[-1].endswith("<|im_end|>\n")
    assert "".join(pieces).strip("\n").endswith("I think the answer is seven.<|im_end|>")


def test_characters_of_several_tokens_are_trained_whole() -> None:
    tokens = tokenizer(CHATML, special="</s> <|im_end|>", merges=True)
    for answer in ("🙂", "a🙂b", "é"):
        result = encoded(tokens, chat(("u", "🙂"), ("a", answer)))
        assert text(tokens, result.labels).strip("\n") == f"{answer}<|im_end|>"


def test_offsets_that_leave_white_space_out() -> None:
    from tokenizers import processors

    tokens = tokenizer(LLAMA2, bos="<s>")
    tokens.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert text(tokens, encoded(tokens, chat(("u", "q"), ("a", "b  c"))).labels) == " b  c </s>"
    tokens = tokenizer(MARKED.replace("'<|im_end|>\\n' }}{% endgen", "'<|im_end|> ' }}{% endgen"))
    tokens.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    row = chat(("u", "q"), ("a", "b"), ("u", "q"))
    assert text(tokens, encoded(tokens, row).labels) == "b<|im_end|> "


def test_nothing_to_train_is_dropped() -> None:
    tokens = style_tokenizer("chatml")
    template = resolve_template(tokens, None)
    assert encode_chat(template, tokens, chat(("u", "q")), 99) == Dropped("no message to train on")
    row = chat(("u", "q"), ("a", "b", False))
    assert encode_chat(template, tokens, row, 99) == Dropped("no message to train on")


def test_drop_leaves_longer_rows_out() -> None:
    tokens = style_tokenizer("chatml")
    template = resolve_template(tokens, None)
    length = len(encoded(tokens, LONG).input_ids)
    assert encode_chat(template, tokens, LONG, length, "drop") == encoded(tokens, LONG)
    assert encode_chat(template, tokens, LONG, length - 1, "drop") == Dropped("longer than max_length")


@pytest.mark.parametrize("name", [name for name in STYLES if STYLES[name].system])
def test_no_cut_takes_an_end_marker_or_a_part_of_an_answer(name: str) -> None:
    tokens = style_tokenizer(name)
    template = resolve_template(tokens, None)
    whole = encoded(tokens, LONG)
    rendered = {
        text(tokens, [*encoded(tokens, Chat(LONG.messages[:k], LONG.place)).labels]): k for k in (3, 5, 7)
    }  # the labelled texts that a whole number of turns has
    shortest = len(text(tokens, encoded(tokens, Chat(LONG.messages[:3], LONG.place)).labels))
    seen = Counter[str | None]()
    for max_length in range(1, len(whole.input_ids) + 2):
        result = encode_chat(template, tokens, LONG, max_length)
        if isinstance(result, Dropped):
            assert result.reason == "answer longer than max_length"
            labelled = [
                label
                for label in encoded(tokens, Chat(LONG.messages[:3], LONG.place)).labels
                if label != -100
            ]
            assert max_length < len(labelled) <= shortest
            continue
        assert len(result.input_ids) == len(result.labels) <= max_length
        assert text(tokens, result.labels) in rendered
        assert result.truncated == (max_length < len(whole.input_ids)) == (result.reason is not None)
        seen[result.reason] += 1
    assert set(seen) == {None, "turns after the last answer that fits left out", "prompt cut"}


def test_later_turns_go_first() -> None:
    tokens = style_tokenizer("chatml")
    whole = encoded(tokens, LONG)
    cut = encoded(tokens, LONG, len(whole.input_ids) - 2)
    assert text(tokens, cut.input_ids) == text(
        tokens, encoded(tokens, Chat(LONG.messages[:5], LONG.place)).input_ids
    )
    # the newline after the last end marker may go alone
    assert encoded(tokens, LONG, len(whole.input_ids) - 1).labels == whole.labels[:-1]


def test_a_cut_chat_is_rendered_as_one_that_ends_there() -> None:
    tokens = style_tokenizer("qwen3")
    row = chat(("u", "q"), ("a", "<think>\nhm\n</think>\n\n1"), ("u", "q"), ("a", "2" * 200))
    cut = encoded(tokens, row, 100)
    assert text(tokens, cut.labels) == "<think>\nhm\n</think>\n\n1<|im_end|>"


def test_then_the_oldest_turns_of_the_prompt() -> None:
    tokens = style_tokenizer("chatml")
    row = chat(("s", "sys"), ("u", "x" * 50), ("a", "old", False), ("u", "q"), ("a", "new"))
    short = encoded(tokens, chat(("s", "sys"), ("u", "q"), ("a", "new")))
    cut = encoded(tokens, row, len(short.input_ids))
    assert cut.input_ids == short.input_ids
    assert cut.reason == "oldest turns of the prompt left out"


def test_then_the_middle_of_the_prompt() -> None:
    tokens = style_tokenizer("chatml")
    row = chat(("s", "system"), ("u", "abcdefghij"), ("a", "new"))
    length = len(encoded(tokens, row).input_ids) - 1  # the last newline is not needed

    def cut(less: int) -> str:
        result = encoded(tokens, row, length - less)
        assert text(tokens, result.labels) == "new<|im_end|>"
        return text(tokens, result.input_ids)

    turns = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\nnew<|im_end|>"
    assert cut(4) == turns.format("system", "abchij")
    assert cut(10) == turns.format("system", "")
    assert cut(12) == turns.format("syem", "")
    assert cut(16) == turns.format("", "")
    assert turns.format("", "").endswith(cut(30))
    row = chat(("s", "system's prompt"), ("u", "ab"), ("a", "new"))
    length = len(encoded(tokens, row).input_ids) - 1
    assert cut(3) == turns.format("system' prompt", "")
    row = chat(("u", "ab🙂🙂🙂🙂cd"), ("a", "new"))
    for max_length in range(10, 60):
        assert "\ufffd" not in text(tokens, encoded(tokens, row, max_length).input_ids)


def test_prompt_and_reference() -> None:
    tokens = tokenizer(LLAMA3, bos="<s>")
    template = resolve_template(tokens, None)
    row = chat(("u", "q"), ("a", "one"), ("u", "r"), ("a", "two"))
    prompt = prompt_ids(template, tokens, row)
    whole = encoded(tokens, row)
    assert whole.input_ids[: len(prompt)] == prompt
    assert text(tokens, whole.input_ids[len(prompt) :]) == "two<|eot_id|>"
    assert reference(row) == "two"
    assert text(tokens, prompt_ids(template, tokens, chat(("u", "q")))).endswith(
        "assistant<|end_header_id|>\n\n"
    )
    with pytest.raises(DataError, match=r"chats.jsonl:7: .* no answer"):
        reference(chat(("u", "q")))


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self) -> dict[str, int]:
            return {"</s>": 0}

        def _convert_token_to_id(self, token: str) -> int:
            return 0

    slow = Slow(eos_token="</s>")
    with pytest.raises(UserError, match="tokenizer: Slow gives no character offsets"):
        encode_chat(resolve_template(slow, "none"), slow, chat(("u", "q"), ("a", "b")), 99)
