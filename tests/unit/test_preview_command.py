"""`tunesmith preview` shows what is trained in a row, and how the rows are long, packed and left out."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.numerics.tiny_data import ROWS
from tunesmith.commands.preview import Bin, bars, histogram, preview, show
from tunesmith.commands.preview_samples import pieces
from tunesmith.errors import UserError
from tunesmith.recipe import Recipe
from tunesmith.tokenizer import tokenizer_for

MakeRecipe = Callable[..., Recipe]


def shown(recipe: Recipe, rows: int = 3, split: str = "train") -> str:
    out = io.StringIO()
    show(preview(recipe, Path(), split, rows), Console(file=out, width=80))
    return out.getvalue()


def one_row(tmp_path: Path, format_name: str, *rows: dict[str, Any]) -> dict[str, Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"split": None, "train": [{"path": str(path), "format": format_name}]}


def marked(text: str) -> list[str]:
    return re.findall(r"\[\[(.*?)\]\]", text, re.DOTALL)


def bare(make_recipe: MakeRecipe, case: str, **sections: Any) -> Recipe:
    """Without eval rows, which these files are too few for."""
    recipe = make_recipe(case)
    values = recipe.model_dump(exclude_unset=True)
    values.pop("evaluation", None)
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    return Recipe.model_validate(values)


def test_a_chat_is_trained_on_its_answers_and_their_end(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    turns = [
        ("system", "be red"),
        ("user", "blue?"),
        ("assistant", "yes blue"),
        ("user", "red?"),
        ("assistant", "no"),
    ]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    recipe = bare(make_recipe, "sft", data={**one_row(tmp_path, "messages", row), "max_length": 160})
    text = shown(recipe)
    assert marked(text) == ["yes blue<|im_end|>", "no<|im_end|>"]
    assert "<|im_start|>system\nbe red<|im_end|>" in text
    counts = re.search(r"(\d+) tokens, (\d+) of them trained", text)
    assert counts is not None
    tokens, trained = int(counts[1]), int(counts[2])
    tokenizer, _ = tokenizer_for(recipe, tmp_path)
    assert trained == sum(len(tokenizer(piece)["input_ids"]) for piece in marked(text)) < tokens


def test_labels_of_classification(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [{"text": "red", "label": "warm"}, {"text": "blue", "label": "cold"}]
    text = shown(bare(make_recipe, "single_label", data=one_row(tmp_path, "classification", *rows)))
    assert marked(text) == ["warm", "cold"]
    assert "text: [CLS] r" in text
    rows = [{"text": "red", "label": ["x", "z"]}, {"text": "blue", "label": []}]
    text = shown(bare(make_recipe, "multi_label", data=one_row(tmp_path, "classification", *rows)))
    assert marked(text) == ["x, z", "(none)"]
    rows = [{"text": "red", "label": 0.5}, {"text": "blue", "label": -2.0}]
    text = shown(bare(make_recipe, "regression", data=one_row(tmp_path, "classification", *rows)))
    assert marked(text) == ["0.5", "-2"]


def test_tags_stand_at_their_words(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    row = {"tokens": ["see", "velvet", "river"], "tags": ["O", "B-LOC", "I-LOC"]}
    text = shown(bare(make_recipe, "token_classification", data=one_row(tmp_path, "tokens", row)))
    assert "words: see/O [[velvet/B-LOC]] [[river/I-LOC]]" in text


def test_the_answer_in_its_window(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    context = "red stone and blue water under the bridge"
    rows = [
        {
            "id": "1",
            "question": "what",
            "context": context,
            "answers": [{"text": "blue water", "answer_start": 14}],
        },
        {"id": "2", "question": "who", "context": context, "answers": []},
    ]
    text = shown(bare(make_recipe, "question_answering", data=one_row(tmp_path, "squad", *rows)))
    assert [piece.strip() for piece in marked(text)] == ["blue water"]
    assert text.count("without the answer") == 1


def test_source_and_target(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    row = {"source": "red river", "target": "river red"}
    text = shown(bare(make_recipe, "seq2seq_t5", data=one_row(tmp_path, "translation", row)))
    assert "source: red river</s>" in text
    assert marked(text) == ["river red</s>"]


def test_masks_and_spans_of_the_first_epoch(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    row = {"text": "red river under the yellow bridge " * 4}
    text = shown(bare(make_recipe, "masked_lm", data={**one_row(tmp_path, "text", row), "max_length": 160}))
    masked = marked(text)
    assert masked
    assert all("→" in piece for piece in masked)
    assert "→[MASK]]]" in text
    assert f"{len(masked)} of them trained" in text
    text = shown(
        bare(make_recipe, "span_corruption", data={**one_row(tmp_path, "text", row), "max_length": 160})
    )
    source, target = re.findall(r"(?:source|target): (.*)", text)
    assert "<extra_id_0>" in source
    assert target.startswith("[[<extra_id_0>")


def test_what_is_left_out_has_a_reason_and_a_place(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [{"text": "red", "label": "a"}, {"text": "", "label": "b"}, {"text": "red " * 99, "label": "b"}]
    text = shown(bare(make_recipe, "single_label", data=one_row(tmp_path, "classification", *rows)))
    assert f"1 dropped: empty text, such as {tmp_path}/rows.jsonl:2" in text
    assert f"1 truncated to max_length 64, such as {tmp_path}/rows.jsonl:3" in text
    assert "1 ← max_length" in text


def test_packing_is_measured_on_the_real_windows(make_recipe: MakeRecipe) -> None:
    """Every row is in one sequence, so the tokens are those of all rows."""
    recipe = make_recipe(
        "causal_lm", data={"packing": True, "group_by_length": False, "split": {"eval": 0.2}}
    )
    found = preview(recipe, Path(), rows=1000)
    assert found.packing is not None
    assert len(found.samples) == found.rows
    assert found.packing.tokens == sum(int(one.about.split()[0]) for one in found.samples)
    assert found.packing.tokens / 64 <= found.packing.sequences < found.rows
    assert found.packing.efficiency == found.packing.tokens / (64 * found.packing.sequences)
    assert f"{found.packing.efficiency:.1%} of their 64 places" in shown(recipe)


def test_samples_are_spread_and_splits_are_known(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("single_label")
    found = preview(recipe, Path(), "test", 100)
    assert len(found.samples) == found.rows == round(ROWS * 0.2)
    assert len(preview(recipe, Path(), "train", 2).samples) == 2
    with pytest.raises(UserError, match="--split test: the recipe has no such rows"):
        preview(make_recipe("single_label", data={"split": {"eval": 0.2}}), Path(), "test")


def test_histogram() -> None:
    assert histogram(np.array([1, 2, 3, 20]), 20) == [
        Bin(1, 2, 2), Bin(3, 4, 1), *(Bin(i, i + 1, 0) for i in range(5, 19, 2)), Bin(19, 20, 1)
    ]  # fmt: skip
    assert sum(one.rows for one in histogram(np.arange(1, 1000), 512)) == 999
    assert histogram(np.array([1]), 1) == [Bin(1, 1, 1)]
    lines = list(bars([Bin(1, 8, 40), Bin(9, 16, 1)], 10))
    assert lines == [f"   1–8  {'#' * 40} 40", f"   9–16 #{' ' * 39} 1 ← max_length"]


def test_pieces_join_to_the_whole_text(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for case in ("sft", "single_label", "seq2seq_t5"):
        tokenizer, _ = tokenizer_for(make_recipe(case), tmp_path)
        ids = tokenizer("velvet water, under the bridge.")["input_ids"]
        found = pieces(tokenizer, ids, [i % 3 == 0 for i in range(len(ids))])
        assert "".join(text for text, _ in found) == tokenizer.decode(ids)
        assert [trained for _, trained in found[:2]] == [True, False]


def test_a_row_cannot_steer_the_terminal(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    row = {"prompt": "red", "answer": "\x1b[2Jblue\x07"}
    recipe = bare(make_recipe, "sft", data={**one_row(tmp_path, "prompt_answer", row), "max_length": 160})
    text = shown(recipe)
    assert "\x1b" not in text
    assert "\\x1b[2Jblue\\x07" in text


def test_a_terminal_has_colours_in_place_of_brackets(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    row = {"prompt": "red", "answer": "blue"}
    recipe = bare(make_recipe, "sft", data={**one_row(tmp_path, "prompt_answer", row), "max_length": 160})
    out = io.StringIO()
    show(preview(recipe, Path()), Console(file=out, force_terminal=True, color_system="standard", width=80))
    assert "[[" not in out.getvalue()
    assert "\x1b[1;32mblue<|im_end|>" in out.getvalue()
