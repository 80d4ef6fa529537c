"""Bad files and settings, each with the exact line that the user reads."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.formats import examples
from tunesmith.errors import DataError
from tunesmith.recipe.data import Source

Files = Mapping[str, str | bytes]


@dataclass(frozen=True)
class Bad:
    """`files` are written into an empty folder and the first is read; `error` begins behind the folder."""

    files: Files
    error: str
    format: str = "classification"
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


def csv(content: str | bytes, error: str, **settings: Any) -> Bad:
    return Bad({"a.csv": content}, error, settings=settings)


def rows(format: str, row: Any, error: str, **settings: Any) -> Bad:
    return Bad({"a.jsonl": json.dumps(row)}, f"a.jsonl:1: {error}", format, settings)


def messages(message: Any, error: str) -> Bad:
    turns = [message, {"role": "assistant", "content": "a"}]
    return rows("messages", {"messages": turns}, f"messages: message 1: {error}")


def sharegpt(message: Any, error: str, **columns: Any) -> Bad:
    turns = [message, {"from": "gpt", "value": "a"}]
    return rows("sharegpt", {"conversations": turns, **columns}, error)


def squad(answers: Any, error: str) -> Bad:
    return rows("squad", {"question": "q", "context": "c", "answers": answers}, f"answers: {error}")


PACKED = gzip.compress(b"text,label\na,b\n" * 100, mtime=0)
UTF8 = "is not utf-8: name the file's own encoding, such as `encoding: "
GOOD = '{"text": "a", "label": "b"}\n'

FILES = {
    "missing file": Bad(
        {"trian.csv": "x"},
        "train.csv: no such file or folder; did you mean trian.csv?",
        settings={"path": "train.csv"},
    ),
    "missing file, none like it": Bad(
        {"x.bin": "x"}, "train.csv: no such file or folder", settings={"path": "train.csv"}
    ),
    "missing folder": Bad(
        {"data/a.csv": "x"},
        "dta/a.csv: there is no folder {d}/dta; did you mean data?",
        settings={"path": "dta/a.csv"},
    ),
    "folder without files": Bad(
        {"d/README.md": "x"}, "d: the folder has no data files", settings={"path": "d"}
    ),
    "archive": Bad(
        {"a.tar.gz": PACKED}, "a.tar.gz: archives are not read (.tar): unpack it and name its files or folder"
    ),
    "empty csv": csv("", "a.csv: the file is empty"),
    "empty text": Bad({"a.txt": ""}, "a.txt: the file is empty", "text"),
    "header only": csv("text,label\n", "a.csv: there are no rows in it"),
    "empty list": Bad({"a.json": "[]"}, "a.json: there are no rows in it"),
    "empty shard in a folder": Bad(
        {"d/a.jsonl": GOOD, "d/b.jsonl": ""}, "d/b.jsonl: the file is empty", settings={"path": "d"}
    ),
    "truncated gzip": Bad(
        {"a.csv.gz": PACKED[:-12]}, "a.csv.gz: the gzip file is cut off: copy or download it again"
    ),
    "not a gzip": Bad(
        {"a.csv.gz": "text,label\n"}, "a.csv.gz: not a gzip file: take .gz off its name or compress it"
    ),
    "damaged gzip": Bad(
        {"a.csv.gz": PACKED[:-8] + b"\0" + PACKED[-7:]},
        "a.csv.gz: the gzip file is damaged: copy or download it again",
    ),
    "not parquet": Bad(
        {"a.parquet": "PAR1 and more than twelve bytes"},
        "a.parquet: not a Parquet file, or a damaged one: Parquet magic bytes not found in footer. "
        "Either the file is corrupted or this is not a parquet file.",
    ),
    "latin-1 as utf-8": csv(
        "text,label\nfür,b\n".encode("latin-1"),
        f"a.csv:2: byte 0xfc at offset 12 {UTF8}latin-1`",
    ),
    "utf-8 cut within a character": Bad(
        {"a.jsonl": GOOD.encode() + b'{"text": "\xe4\xbd'},
        f"a.jsonl:2: byte 0xe4 at offset 38 {UTF8}latin-1`",
    ),
    "utf-16 as utf-8": Bad(
        {"a.txt": "a".encode("utf-16")},
        f"a.txt:1: byte 0xff at offset 0 {UTF8}utf-16`",
        "text",
    ),
    "bytes far into a gzip": Bad(
        {"a.txt.gz": gzip.compress("é\n".encode() * 1_000_000 + b"\xff")},
        f"a.txt.gz:1000001: byte 0xff at offset 3000000 {UTF8}latin-1`",
        "text",
    ),
    "binary": Bad(
        {"a.bin": b"a\nb\0c"},
        "a.bin:2: a NUL character: this is no text in utf-8; set `encoding`, or leave the file out",
        "text",
    ),
    "unknown encoding": csv(
        "a", "a.csv: encoding: there is no text encoding 'utf9', such as utf-8", encoding="utf9"
    ),
    "bytes codec": csv(
        "a", "a.csv: encoding: there is no text encoding 'zlib', such as utf-8", encoding="zlib"
    ),
}
JSON = {
    "jsonl": Bad({"a.jsonl": GOOD + '{"text": }'}, "a.jsonl:2: bad JSON at column 10: Expecting value"),
    "jsonl row": Bad({"a.jsonl": GOOD + "[1]"}, "a.jsonl:2: a row must be an object, not a list"),
    "json element": Bad({"a.json": f'[\n{GOOD},\n"x"\n]'}, "a.json:4: a row must be an object, not text"),
    "json within": Bad(
        {"a.json": f"[\n{GOOD},\n{{'text': 1}}\n]"},
        "a.json:4: bad JSON at column 2: Expecting property name enclosed in double quotes",
    ),
    "json comma": Bad(
        {"a.json": f"[\n{GOOD}{GOOD}]"}, "a.json:3: bad JSON at column 1: Expecting ',' delimiter"
    ),
    "json unfinished": Bad(
        {"a.json": f"[\n{GOOD}"}, "a.json:3: bad JSON at column 1: Expecting ',' delimiter"
    ),
    "json extra": Bad({"a.json": f"[\n{GOOD}]\n]"}, "a.json:4: bad JSON at column 1: Extra data"),
    "json two lists": Bad(
        {"a.json": '{"a": [], "b": []}'},
        "a.json: must be a list of rows, or an object with one list; it has several lists (a, b)",
    ),
    "json no list": Bad(
        {"a.json": GOOD}, "a.json: must be a list of rows, or an object with one list; it has no list"
    ),
    "json scalar": Bad({"a.json": "3"}, "a.json: must be a list of rows, not a number"),
    "squad paragraphs": Bad(
        {"a.json": '{"data": [{"paragraphs": [{"context": "c", "qas": {}}]}]}'},
        "a.json: article 1: `qas` must be a list of objects",
        "squad",
    ),
}
CSV = {
    "too many": csv(
        "text,label\na,b\nc,d,e\n",
        "a.csv:3: fields: 3, but the header names 2: quote a field that holds the delimiter",
    ),
    "too few after a long field": csv(
        'text,label\n"a\nb",c\nd\n',
        "a.csv:4: fields: 1, but the header names 2: quote a field that holds the delimiter",
    ),
    "uneven without header": csv(
        "a,b\nc\n",
        "a.csv:2: fields: 1, but the first row has 2: mend the row",
        header=False,
        quoting=False,
        columns={"text": "0", "label": "1"},
    ),
    "unclosed quote": csv(
        'text,label\n"a,b\nc,d\n',
        "a.csv:2: bad CSV: unexpected end of data: close or double the quotes, or set `quoting: false`",
    ),
    "no header": csv(
        "nice,good\nbad,poor\n",
        "a.csv:2: label: there is no such column, but nice, good; "
        "set `header: false` if the first line is a row",
    ),
    "duplicate header": csv(
        "text,label,text\na,b,c\n",
        "a.csv:1: 'text': columns 1 and 3 have the same name: rename one, or set `header: false`",
    ),
    "misspelt column": csv(
        "text,lable\na,b\n", "a.csv:2: label: there is no such column, but text, lable; did you mean lable?"
    ),
    "delimiter of two": csv("a\n", "a.csv: delimiter: must be one character, not '||'", delimiter="||"),
    "constant": csv(
        "text,label\na,b\n",
        "a.csv:2: label: a constant has the name of a column of the file: rename it",
        constants={"label": "x"},
    ),
    "null label": csv("text,label\na,\n", "a.csv:2: label: the label is empty"),
    "label column no number": csv(
        "text,x,y\na,1,b\n", "a.csv:2: y: must be a number, not text 'b'", columns={"label": ["x", "y"]}
    ),
}
BIO = {
    "too few": Bad(
        {"a.conll": "a O\nb\n"}, "a.conll:2: too few columns (1): a token and a tag are two", "tokens"
    ),
    "too few for columns": Bad(
        {"a.conll": "\na\tO\n"},
        "a.conll:2: too few columns (2): `columns` names number 2, counted from 0",
        "tokens",
        {"columns": {"tags": "2"}},
    ),
    "empty tag": Bad({"a.conll": "a\tO\nb\t\n"}, "a.conll:2: tags: the tag is empty", "tokens"),
    "column by name": Bad(
        {"a.conll": "a O\n"},
        "a.conll: columns: tags: must be a 0-based column number in quotes, not 'ner'",
        "tokens",
        {"columns": {"tags": "ner"}},
    ),
    "no tags": Bad({"a.conll": "a\n\nb\n"}, "a.conll:1: tags: there is no such column, but tokens", "tokens"),
}
# a setting's error begins with the path as the recipe gives it
SETTINGS = {
    "unknown column key": csv(
        "text,label\na,b\n",
        "a.csv: columns: format classification has no lable, but text, label, soft_labels, group; did you mean label?",
        columns={"lable": "x"},
    ),
    "list of columns": csv(
        "text,label\na,b\n", "a.csv: columns: text: must name one column", columns={"text": ["a", "b"]}
    ),
    "optional column that no row has": Bad(
        {"a.jsonl": '{"prompt": "p", "answer": "a", "systm": "s"}'},
        "a.jsonl: columns: system: no row has a column syst; did you mean systm?",
        "prompt_answer",
        {"columns": {"system": "syst"}},
    ),
    "header of json": Bad(
        {"a.jsonl": GOOD},
        "a.jsonl: header: has no effect, there is no .csv or .tsv file: leave the setting out",
        settings={"header": False},
    ),
    "split of a file": csv(
        "text,label\na,b\n",
        "a.csv: split: has no effect, there is no hub data set: leave the setting out",
        split="train",
    ),
    "split_by of a csv": csv(
        "text,label\na,b\n",
        "a.csv: split_by: has no effect, there is no plain-text file: leave the setting out",
        split_by="line",
    ),
    "encoding of parquet": Bad(
        {"a.parquet": "x"},
        "a.parquet: encoding: has no effect, there is no text file: leave the setting out",
        settings={"encoding": "latin-1"},
    ),
}
VALUES = {
    "text null": rows("text", {"text": None}, "text: must be text, not null"),
    "text number": rows("text", {"text": 3}, "text: must be text, not a number (3)"),
    "no columns": rows("text", {}, "text: there is no such column, but none"),
    "half a character": rows(
        "text", {"text": "a\ud83d"}, "text: half a character (\\ud83d): repair the text"
    ),
    "label null": rows("classification", {"text": "a", "label": None}, "label: must be text, not null"),
    "label object": rows("classification", {"text": "a", "label": {}}, "label: must be text, not an object"),
    "label nan": rows(
        "classification", {"text": "a", "label": float("nan")}, "label: must be a finite number, not nan"
    ),
    "labels mixed": rows(
        "classification",
        {"text": "a", "label": [1, "b"]},
        "label: a list of labels must be all text or all numbers; it has text 'b'",
    ),
    "pair missing": rows(
        "pairs",
        {"text": "a", "label": "b"},
        "text_pair: there is no such column, but text, label; did you mean text?",
    ),
    "answer list": rows("alpaca", {"instruction": "a", "output": ["b"]}, "output: must be text, not a list"),
    "history of one": rows(
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "history: turn 1: must be [user, assistant], not a list of 1",
    ),
    "tags fewer": rows(
        "tokens", {"tokens": ["a", "b"], "tags": ["O"]}, "tags: tags: 1, but tokens: 2; each token has one"
    ),
    "tokens text": rows("tokens", {"tokens": "a b", "tags": []}, "tokens: must be a list, not text 'a b'"),
    "token null": rows(
        "tokens", {"tokens": ["a", None], "tags": []}, "tokens: token 2: must be text, not null"
    ),
    "tokens empty": rows("tokens", {"tokens": [], "tags": []}, "tokens: the list is empty"),
    "target empty": rows("translation", {"source": "a", "target": []}, "target: the list is empty"),
    "source number": rows(
        "translation", {"source": 1, "target": "b"}, "source: must be text, not a number (1)"
    ),
    "answers missing": rows(
        "squad", {"question": "q", "context": "c"}, "answers: there is no such column, but question, context"
    ),
    "answers text": squad("c", "must be a list, not text 'c'"),
    "answer_start text": squad(
        [{"text": "c", "answer_start": "0"}],
        "answer 1: answer_start: must be a number of characters, not text '0'",
    ),
    "answers uneven": squad({"text": ["c"], "answer_start": []}, "texts: 1, but answer_start: 0"),
}
CHATS = {
    "unknown role": messages(
        {"role": "bot", "content": "a"}, "unknown role 'bot': there are system, user, assistant, tool"
    ),
    "no content": messages({"role": "user"}, "has no content"),
    "image": messages(
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
        "a content part 'image_url': only text is read",
    ),
    "part of text": messages(
        {"role": "user", "content": ["a"]}, "a content part that is text 'a': only text is read"
    ),
    "weight": messages(
        {"role": "user", "content": "a", "weight": 0.5}, "weight: must be 0 or 1, not a number (0.5)"
    ),
    "train": messages(
        {"role": "user", "content": "a", "train": "no"}, "train: must be true or false, not text 'no'"
    ),
    "train and weight": messages(
        {"role": "user", "content": "a", "train": True, "weight": 0}, "train and weight contradict each other"
    ),
    "call without name": messages(
        {"role": "assistant", "tool_calls": [{"function": {}}]}, "a tool call has no function with a name"
    ),
    "arguments": messages(
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]},
        "arguments of f: bad JSON at character 2: Expecting property name enclosed in double quotes",
    ),
    "empty chat": rows("messages", {"messages": []}, "messages: there are no messages"),
    "null chat": rows("messages", {"messages": None}, "messages: must be a list, not null"),
    "no assistant": rows(
        "messages",
        {"messages": [{"role": "user", "content": "a"}]},
        "messages: there is no assistant message to learn from",
    ),
    "message is text": rows(
        "messages", {"messages": ["a"]}, "messages: must be a list of objects; one is text 'a'"
    ),
    "tools no JSON": rows(
        "messages",
        {"messages": [{"role": "assistant", "content": "a"}], "tools": "f"},
        "tools: bad JSON at character 1: Expecting value",
    ),
    "unknown from": sharegpt(
        {"from": "bot", "value": "a"},
        "conversations: message 1: unknown `from` 'bot': there are system, human, user, gpt, assistant, "
        "function_call, observation, tool",
    ),
    "no value": sharegpt({"from": "human"}, "conversations: message 1: has no value"),
    "bad call": sharegpt(
        {"from": "function_call", "value": "f(x)"},
        "conversations: message 1: function_call: bad JSON at character 1: Expecting value",
    ),
    "two systems": sharegpt(
        {"from": "system", "value": "a"},
        "system: the conversation begins with a system message already: keep one",
        system="b",
    ),
}
GROUPS = {"files": FILES, "json": JSON, "csv": CSV, "bio": BIO, "values": VALUES, "chats": CHATS}
CASES = {f"{group} {name}": bad for group, table in GROUPS.items() for name, bad in table.items()}


def error_of(bad: Bad, folder: Path) -> DataError:
    for name, content in bad.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    path = next(iter(bad.files))
    source = Source.model_validate({"path": path, "format": bad.format, **bad.settings})
    with pytest.raises(DataError) as caught:
        list(examples(source, folder))
    return caught.value


@pytest.mark.parametrize("bad", CASES.values(), ids=CASES.keys())
def test_bad_data(tmp_path: Path, bad: Bad) -> None:
    error = error_of(bad, tmp_path)
    assert str(error) == f"{tmp_path}/{bad.error}".replace("{d}", str(tmp_path))
    assert error.exit_code == 2


@pytest.mark.parametrize("bad", SETTINGS.values(), ids=SETTINGS.keys())
def test_bad_settings(tmp_path: Path, bad: Bad) -> None:
    assert str(error_of(bad, tmp_path)) == bad.error


def test_place_and_column_are_kept(tmp_path: Path) -> None:
    error = error_of(CSV["null label"], tmp_path)
    assert error.place is not None
    assert (error.place.file, error.place.line, error.column) == (str(tmp_path / "a.csv"), 2, "label")


def test_a_folder_that_links_to_itself(tmp_path: Path) -> None:
    (tmp_path / "d/e").mkdir(parents=True)
    (tmp_path / "d/e/loop").symlink_to(tmp_path / "d", target_is_directory=True)
    source = Source(path="d", format="text")
    with pytest.raises(DataError) as caught:
        list(examples(source, tmp_path))
    place = tmp_path / "d/e/loop"
    assert str(caught.value) == f"{place}: the folder links back to a folder around it: remove the link"


def test_a_folder_with_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    link = tmp_path / "d/a.txt"
    link.symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError) as caught:
        list(examples(Source(path="d", format="text"), tmp_path))
    assert str(caught.value) == f"{link}: neither a file nor a folder, perhaps a broken link: remove it"


def test_rows_before_the_fault_are_given(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    made = examples(Source(path="a.jsonl", format="text"), tmp_path)
    assert next(made).place.line == 1
    with pytest.raises(DataError, match=r"a\.jsonl:2: bad JSON at column"):
        next(made)
