"""Every row of real data sets gives labels, or a counted reason for having none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from chat_templates import style_tokenizer, tokenizer
from tunesmith.data.chat import EncodedChat, encode_chat, resolve_template
from tunesmith.data.examples import Chat
from tunesmith.data.formats import examples
from tunesmith.recipe.data import Source

SOURCES = {
    "llamafactory_demos/alpaca_en_demo.json": ("alpaca", 999),
    "llamafactory_demos/alpaca_zh_demo.json": ("alpaca", 1000),
    "llamafactory_demos/glaive_toolcall_en_demo.json": ("sharegpt", 300),
    "oasst1_zh/oaast_sft_zh.json": ("alpaca", 689),
    "gsm8k/train.jsonl": ("prompt_answer", 7473),
}


@pytest.mark.data
@pytest.mark.parametrize(
    ("path", "style"),
    [(path, style) for path in SOURCES for style in (None, "qwen3") if "gsm8k" not in path or not style],
)
def test_real_rows(data_dir: Path, path: str, style: str | None) -> None:
    kind, count = SOURCES[path]
    columns = {"prompt": "question", "answer": "answer"} if kind == "prompt_answer" else {}
    rows = examples(Source(path=path, format=kind, columns=columns), data_dir)
    tokens = tokenizer(None, merges=True) if style is None else style_tokenizer(style)
    template = resolve_template(tokens, None)
    outcomes = Counter[str]()
    for row in rows:
        assert isinstance(row, Chat)
        result = encode_chat(template, tokens, row, 2048)
        if isinstance(result, EncodedChat):
            assert len(result.input_ids) == len(result.labels) <= 2048
            trained = tokens.decode([label for label in result.labels if label != -100])
            assert trained.rstrip("\n").endswith("<|im_end|>")
            if not result.truncated:
                answers = [m for m in row.messages if m.role == "assistant"]
                assert trained.count("<|im_end|>") == len(answers)
                assert all(m.content in trained for m in answers)
        outcomes[type(result).__name__] += 1
    assert outcomes["EncodedChat"] + outcomes["Dropped"] == count
    assert outcomes["EncodedChat"] > 0.9 * count
