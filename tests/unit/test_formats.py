"""Formats: what each kind of row becomes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.examples import (
    Answer,
    Chat,
    Example,
    Labelled,
    Message,
    Question,
    SourceTarget,
    Text,
    Tokens,
)
from tunesmith.data.formats import FormatCounts, examples
from tunesmith.errors import DataError, Place
from tunesmith.recipe.data import Source


def make(
    folder: Path,
    format: str,
    *rows: dict[str, Any],
    need_labels: bool = True,
    counts: FormatCounts | None = None,
    **settings: Any,
) -> list[Example]:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source.model_validate({"path": "a.jsonl", "format": format, **settings})
    return list(examples(source, folder, need_labels=need_labels, counts=counts))


def chat(folder: Path, format: str, row: dict[str, Any], **settings: Any) -> Chat:
    (made,) = make(folder, format, row, **settings)
    assert isinstance(made, Chat)
    return made


def turns(made: Chat) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in made.messages]


def test_text_keeps_empty_documents(tmp_path: Path) -> None:
    place = str(tmp_path / "a.jsonl")
    made = make(tmp_path, "text", {"body": "a"}, {"body": " \n"}, columns={"text": "body"})
    assert made == [Text("a", Place(place, 1)), Text(" \n", Place(place, 2))]


def test_prompt_answer(tmp_path: Path) -> None:
    columns = {"prompt": "q", "answer": "a", "system": "s"}
    made = make(
        tmp_path, "prompt_answer", {"q": "1", "a": "2", "s": "3"}, {"q": "4", "a": "5"}, columns=columns
    )
    assert [turns(one) for one in made if isinstance(one, Chat)] == [
        [("system", "3"), ("user", "1"), ("assistant", "2")],
        [("user", "4"), ("assistant", "5")],
    ]


def test_alpaca_with_history_and_input(tmp_path: Path) -> None:
    row = {
        "instruction": "do",
        "input": "this",
        "output": "done",
        "history": [["a", "b"], ["c", "d"]],
        "system": "be",
    }
    assert turns(chat(tmp_path, "alpaca", row)) == [
        ("system", "be"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "do\nthis"),
        ("assistant", "done"),
    ]
    for empty in ({"input": ""}, {"input": None, "history": None}, {"history": []}):
        row = {"instruction": "do", "output": "done", **empty}
        assert turns(chat(tmp_path, "alpaca", row)) == [("user", "do"), ("assistant", "done")]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def test_messages_with_tools_parts_and_weights(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    openai = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "assistant", "content": "hello", "train": False},
            {"role": "user", "content": parts, "tool_calls": None, "weight": None},
            {"role": "assistant", "content": None, "tool_calls": [openai], "weight": 1},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "two", "weight": 0},
        ],
        "tools": [TOOL],
    }
    made = chat(tmp_path, "messages", row)
    assert made.messages == (
        Message("assistant", "hello", train=False),
        Message("user", "ab"),
        Message("assistant", "", train=True, tool_calls=({"id": "1", **CALL},)),
        Message("tool", "2"),
        Message("assistant", "two", train=False),
    )
    assert made.tools == (TOOL,)


def test_sharegpt_roles_tools_and_calls(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    row = {
        "system": "be",
        "tools": json.dumps([TOOL["function"]]),
        "conversations": [
            {"from": "human", "value": "u"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "o"},
            {"from": "gpt", "value": "g"},
            {"from": "user", "value": "v"},
            {"from": "function_call", "value": json.dumps([call, call])},
        ],
    }
    made = chat(tmp_path, "sharegpt", row)
    assert made.messages == (
        Message("system", "be"),
        Message("user", "u"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "o"),
        Message("assistant", "g"),
        Message("user", "v"),
        Message("assistant", "", tool_calls=(CALL, CALL)),
    )
    assert made.tools == (TOOL,)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("x", "x"),
        (3, "3"),
        (True, "True"),
        (0.5, 0.5),
        (1.0, 1.0),
        (["a", "b"], ("a", "b")),
        ([], ()),
        ([1, 0.5], (1.0, 0.5)),
    ],
)
def test_labels(tmp_path: Path, label: object, expected: object) -> None:
    (made,) = make(tmp_path, "classification", {"text": "t", "label": label})
    assert isinstance(made, Labelled)
    assert made.label == expected
    assert type(made.label) is type(expected)
    (pair,) = make(tmp_path, "pairs", {"text": "t", "text_pair": "u", "label": label})
    assert pair == Labelled("t", made.label, made.place, "u")


def test_several_label_columns_and_csv_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,a,b,label\nt,1,2.5,7\n")
    plain = Source(path="a.csv", format="classification")
    several = Source(path="a.csv", format="classification", columns={"label": ["a", "b"]})
    place = Place(str(tmp_path / "a.csv"), 2)
    assert list(examples(plain, tmp_path)) == [Labelled("t", "7", place)]
    assert list(examples(several, tmp_path)) == [Labelled("t", (1.0, 2.5), place)]


def test_constants_give_the_label(tmp_path: Path) -> None:
    (tmp_path / "a.pos").write_text("fine\n")
    source = Source(path="a.pos", format="classification", constants={"label": "pos"})
    assert list(examples(source, tmp_path)) == [Labelled("fine", "pos", Place(str(tmp_path / "a.pos"), 1))]


def test_tokens_from_json_and_bio(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "a.jsonl"), 1)
    row = {"words": ["a", "b"], "ner": ["O", 3]}
    columns = {"tokens": "words", "tags": "ner"}
    assert make(tmp_path, "tokens", row, columns=columns) == [Tokens(("a", "b"), ("O", "3"), place)]
    (tmp_path / "a.iob2").write_text("1\ta\tO\t-\n")
    source = Source(path="a.iob2", format="tokens", columns={"tokens": "1", "tags": "2"})
    assert list(examples(source, tmp_path)) == [Tokens(("a",), ("O",), Place(str(tmp_path / "a.iob2"), 1))]


def squad(context: str, *answers: tuple[str, int]) -> dict[str, Any]:
    given = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": 7, "question": "q", "context": context, "answers": given}


def test_squad_repairs_what_it_can_and_counts_the_rest(tmp_path: Path) -> None:
    counts = FormatCounts()
    rows = [
        squad("ab ab ab", ("ab", 3)),
        squad("ab ab ab", ("ab", 5), ("zz", 0)),
        squad("ab", ("zz", 0), ("", 0)),
        squad("none"),
    ]
    made = make(tmp_path, "squad", *rows, counts=counts)
    place = str(tmp_path / "a.jsonl")
    assert made == [
        Question("7", "q", "ab ab ab", (Answer("ab", 3),), Place(place, 1)),
        Question("7", "q", "ab ab ab", (Answer("ab", 6),), Place(place, 2)),
        Question("7", "q", "none", (), Place(place, 4)),
    ]
    assert counts.dropped == {"answer not in its context": 1}
    assert counts.changed == {
        "answer_start moved to the answer's text": 1,
        "answer left out: not in its context": 3,
    }


def test_squad_in_the_hubs_shape_and_without_id(tmp_path: Path) -> None:
    row = {"question": "q", "context": "abc", "answers": {"text": ["b"], "answer_start": [1]}}
    (made,) = make(tmp_path, "squad", row)
    assert made == Question(str(made.place), "q", "abc", (Answer("b", 1),), made.place)


def test_translation_shapes(tmp_path: Path) -> None:
    place = str(tmp_path / "a.jsonl")
    made = make(
        tmp_path, "translation", {"source": ["a", "b"], "target": ["c", "d"]}, {"source": "e", "target": "f"}
    )
    assert made == [
        SourceTarget("a b", ("c", "d"), Place(place, 1)),
        SourceTarget("e", ("f",), Place(place, 2)),
    ]
    columns = {"source": "en", "target": "de"}
    made = make(tmp_path, "translation", {"translation": {"en": "a", "de": "b"}}, columns=columns)
    assert made == [SourceTarget("a", ("b",), Place(place, 1))]


@pytest.mark.parametrize(
    ("format", "row", "label", "at_prediction"),
    [
        ("prompt_answer", {"prompt": "p"}, {"answer": "a"}, ("user",)),
        ("alpaca", {"instruction": "p"}, {"output": "a"}, ("user",)),
        ("classification", {"text": "t"}, {"label": "l"}, None),
        ("pairs", {"text": "t", "text_pair": "u"}, {"label": "l"}, None),
        ("tokens", {"tokens": ["a"]}, {"tags": ["O"]}, None),
        ("squad", {"question": "q", "context": "c"}, {"answers": []}, ()),
        ("translation", {"source": "s"}, {"target": "t"}, ()),
    ],
)
def test_prediction_needs_no_labels_and_training_does(
    tmp_path: Path, format: str, row: dict[str, Any], label: dict[str, Any], at_prediction: object
) -> None:
    (made,) = make(tmp_path, format, row, need_labels=False, columns={key: key for key in label})
    match made:
        case Chat():
            found: object = tuple(message.role for message in made.messages)
        case Labelled():
            found = made.label
        case Tokens():
            found = made.tags
        case Question():
            found = made.answers
        case SourceTarget():
            found = made.targets
        case _:
            raise AssertionError(made)
    assert found == at_prediction
    (name,) = label
    with pytest.raises(DataError, match=rf"a\.jsonl:1: {name}: there is no such column"):
        make(tmp_path, format, row)
    assert make(tmp_path, format, row | label, need_labels=False) == make(tmp_path, format, row | label)


@pytest.mark.parametrize("format", ["messages", "sharegpt"])
def test_prediction_needs_no_assistant_turn(tmp_path: Path, format: str) -> None:
    row = {
        "messages": [{"role": "user", "content": "u"}],
        "conversations": [{"from": "user", "value": "u"}],
    }
    assert turns(chat(tmp_path, format, row, need_labels=False)) == [("user", "u")]


def test_an_empty_label_at_prediction_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,a,b\nt,,,1\n")
    for columns in ({}, {"label": ["a", "b"]}):
        source = Source.model_validate({"path": "a.csv", "format": "classification", "columns": columns})
        (made,) = examples(source, tmp_path, need_labels=False)
        assert isinstance(made, Labelled)
        assert made.label is None


def read(data_dir: Path, path: str, format: str, **settings: Any) -> tuple[list[Any], FormatCounts]:
    counts = FormatCounts()
    source = Source.model_validate({"path": path, "format": format, **settings})
    return list(examples(source, data_dir, counts=counts)), counts


@pytest.mark.data
def test_real_classification_sets(data_dir: Path) -> None:
    banking, _ = read(data_dir, "banking77/train.csv", "classification", columns={"label": "category"})
    per_class = Counter(row.label for row in banking)
    assert (len(banking), len(per_class), min(per_class.values()), max(per_class.values())) == (
        10003,
        77,
        35,
        187,
    )
    columns = {"label": "0", "text": "1"}
    sms, _ = read(
        data_dir, "sms_spam/sms.tsv", "classification", header=False, quoting=False, columns=columns
    )
    assert Counter(row.label for row in sms) == {"ham": 4827, "spam": 747}
    for name, count in (("pos", 4475), ("neg", 4517)):
        path = f"sentence_polarity/rt-polarity.{name}"
        rows, _ = read(data_dir, path, "classification", constants={"label": name})
        assert Counter(row.label for row in rows) == {name: count}
        assert all(row.text.strip() for row in rows)


WNUT = {
    "wnut17train": (
        3394,
        62730,
        {
            "corporation": 221,
            "creative-work": 140,
            "group": 264,
            "location": 548,
            "person": 660,
            "product": 142,
        },
    ),
    "emerging.dev": (
        1009,
        15733,
        {"corporation": 34, "creative-work": 105, "group": 39, "location": 74, "person": 470, "product": 114},
    ),
}
UNER = {
    "train": (3997, 98616, {"LOC": 2858, "ORG": 1112, "PER": 2148}),
    "dev": (500, 12663, {"LOC": 375, "ORG": 133, "PER": 245}),
}


@pytest.mark.data
def test_real_token_sets(data_dir: Path) -> None:
    files = [(f"wnut17/{name}.conll", {}, expected) for name, expected in WNUT.items()]
    columns = {"tokens": "1", "tags": "2"}
    files += [
        (f"uner_zh_gsdsimp/zh_gsdsimp-ud-{name}.iob2", columns, expected) for name, expected in UNER.items()
    ]
    for path, columns, expected in files:
        rows, _ = read(data_dir, path, "tokens", columns=columns)
        entities = Counter(tag[2:] for row in rows for tag in row.tags if tag.startswith("B-"))
        assert (len(rows), sum(len(row.tokens) for row in rows), entities) == expected


@pytest.mark.data
@pytest.mark.parametrize("name", ["en.json", "zh.json", "de.json", "es.json.gz", "ar.json.gz", "vi.json.gz"])
def test_real_xquad(data_dir: Path, name: str) -> None:
    rows, counts = read(data_dir, f"xquad/xquad.{name}", "squad")
    assert len(rows) == sum(len(row.answers) for row in rows) == 1190
    assert counts == FormatCounts()


@pytest.mark.data
def test_real_cmrc_with_200_misplaced_answers(data_dir: Path) -> None:
    rows, counts = read(data_dir, "cmrc2018/cmrc2018_dev.json.gz", "squad")
    assert len(rows) + sum(counts.dropped.values()) == 3219
    assert sum(counts.changed.values()) == 200
    left_out = counts.changed["answer left out: not in its context"]
    assert sum(len(row.answers) for row in rows) == 9657 - left_out
    for row in rows:
        for answer in row.answers:
            assert row.context[answer.start :].startswith(answer.text)


@pytest.mark.data
def test_real_chats(data_dir: Path) -> None:
    columns = {"prompt": "question"}
    rows, _ = read(data_dir, "gsm8k/train.jsonl", "prompt_answer", columns=columns)
    assert len(rows) == 7473
    assert all("####" in row.messages[1].content for row in rows)
    for name, count in (("alpaca_en_demo", 999), ("alpaca_zh_demo", 1000), ("identity", 91)):
        rows, _ = read(data_dir, f"llamafactory_demos/{name}.json", "alpaca")
        assert len(rows) == count
    rows, _ = read(data_dir, "oasst1_zh/oaast_sft_zh.json", "alpaca")
    # a turn of history is two messages, the row's own turn another two
    assert Counter(len(row.messages) // 2 - 1 for row in rows) == {1: 331, 0: 299, 2: 59}


@pytest.mark.data
def test_real_tool_calls(data_dir: Path) -> None:
    path = "llamafactory_demos/glaive_toolcall_en_demo.json"
    rows, _ = read(data_dir, path, "sharegpt")
    assert len(rows) == 300
    raw = json.loads((data_dir / path).read_text())
    calls = [message.tool_calls for row in rows for message in row.messages if message.tool_calls]
    given = [
        json.loads(turn["value"])
        for row in raw
        for turn in row["conversations"]
        if turn["from"] == "function_call"
    ]
    assert [call["function"] for (call,) in calls] == given
    assert [len(row.tools) for row in rows] == [len(json.loads(row["tools"])) for row in raw]


@pytest.mark.data
def test_real_summaries(data_dir: Path) -> None:
    for name, papers, summaries in (("train.jsonl.gz", 1992, 1992), ("dev.jsonl", 619, 1453)):
        rows, _ = read(data_dir, f"scitldr_a/{name}", "translation")
        assert (len(rows), sum(len(row.targets) for row in rows)) == (papers, summaries)
