"""Reading rows: kinds of files, places, settings, hashes."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunesmith.data.rows import Row, content_hash, files_of, read_rows
from tunesmith.errors import DataError, MachineError, Place
from tunesmith.recipe.data import Source


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(folder: Path, path: str, **settings: Any) -> list[Row]:
    return list(read_rows(Source(path=path, **{"format": "classification", **settings}), folder))


def numbered(rows: list[Row]) -> list[tuple[int, dict[str, Any]]]:
    return [(row.place.line, row.values) for row in rows]


def test_json_list_gives_the_line_on_which_each_element_begins(tmp_path: Path) -> None:
    write(tmp_path, "a.json", '\n[\n  {\n    "t": "x\\ny"\n  }, {"t": "b"},\n\n  {"t": "c"}\n]\n')
    rows = read(tmp_path, "a.json")
    assert numbered(rows) == [(3, {"t": "x\ny"}), (5, {"t": "b"}), (7, {"t": "c"})]
    assert rows[0].place == Place(str(tmp_path / "a.json"), 3)


def test_json_rows_that_share_a_line_are_numbered(tmp_path: Path) -> None:
    write(tmp_path, "a.json", '[{"t": 1},{"t": 2},\n{"t": 3}]')
    assert numbered(read(tmp_path, "a.json")) == [(1, {"t": 1}), (2, {"t": 2}), (3, {"t": 3})]


def test_json_object_with_one_list(tmp_path: Path) -> None:
    write(tmp_path, "a.json", '{"version": {"a": [1]},\n "data": [\n{"t": 1},\n{"t": 2}\n]}')
    assert numbered(read(tmp_path, "a.json")) == [(3, {"t": 1}), (4, {"t": 2})]


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    write(tmp_path, "a.json", '{"t": [1]}\n{"t": [2]}\n')
    assert numbered(read(tmp_path, "a.json")) == [(1, {"t": [1]}), (2, {"t": [2]})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
def test_json_lines_skip_blank_lines_and_keep_odd_separators(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, '\ufeff{"t": "a\u2028b\x85"}\r\n\n{"t": "c"}')
    assert numbered(read(tmp_path, name)) == [(1, {"t": "a\u2028b\x85"}), (3, {"t": "c"})]


def test_squad_is_flattened_and_numbered_by_question(tmp_path: Path) -> None:
    answer = {"text": "c", "answer_start": 0}
    squad = {
        "version": "1.1",
        "data": [
            {
                "paragraphs": [
                    {"context": "c", "qas": [{"id": "1", "question": "q", "answers": [answer]}] * 2}
                ]
            },
            {"paragraphs": [{"context": "d", "qas": [{"id": "3", "question": "r", "answers": []}]}]},
        ],
    }
    write(tmp_path, "a.json", json.dumps(squad, indent=1))
    first = {"context": "c", "id": "1", "question": "q", "answers": [answer]}
    last = {"context": "d", "id": "3", "question": "r", "answers": []}
    assert numbered(read(tmp_path, "a.json", format="squad")) == [(1, first), (2, first), (3, last)]


def test_csv_places_are_first_lines_and_the_mark_is_taken_off(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", '\ufefftext,label\r\n"one\r\ntwo, ""three""",x\r\n\r\nfour,y\r\n')
    rows = numbered(read(tmp_path, "a.csv"))
    assert rows == [
        (2, {"text": 'one\r\ntwo, "three"', "label": "x"}),
        (5, {"text": "four", "label": "y"}),
    ]


def test_csv_without_header_and_quoting(tmp_path: Path) -> None:
    write(tmp_path, "a.tsv", 'ham\t"so he said\nspam\tbuy, "now"\n')
    rows = read(tmp_path, "a.tsv", header=False, quoting=False)
    assert numbered(rows) == [(1, {"0": "ham", "1": '"so he said'}), (2, {"0": "spam", "1": 'buy, "now"'})]


def test_csv_delimiter_encoding_and_large_fields(tmp_path: Path) -> None:
    large = "é" * 300_000
    write(tmp_path, "a.csv", f"t;l\n{large};a,b\n".encode("latin-1"))
    rows = read(tmp_path, "a.csv", delimiter=";", encoding="latin-1")
    assert numbered(rows) == [(2, {"t": large, "l": "a,b"})]


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet(tmp_path: Path, name: str) -> None:
    values = [{"t": "a", "l": [1, 2], "o": {"k": None}}, {"t": "b", "l": [], "o": {"k": 1.5}}]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet")
    if name.endswith(".gz"):
        write(tmp_path, name, gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert numbered(read(tmp_path, name)) == [(1, values[0]), (2, values[1])]


TEXT = "one\n two\r\n\n\n\nthree\n"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"format": "text"}, [(1, "one\n two\n\n\n\nthree\n")]),
        ({"format": "classification"}, [(1, "one"), (2, " two"), (3, ""), (4, ""), (5, ""), (6, "three")]),
        ({"format": "text", "split_by": "line", "limit": 2}, [(1, "one"), (2, " two")]),
        ({"format": "text", "split_by": "paragraph"}, [(1, "one\n two"), (6, "three")]),
        ({"format": "classification", "split_by": "file"}, [(1, "one\n two\n\n\n\nthree\n")]),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.pos", "a.md.gz", "noname"])
def test_plain_text(
    tmp_path: Path, name: str, settings: dict[str, Any], expected: list[tuple[int, str]]
) -> None:
    write(tmp_path, name, gzip.compress(TEXT.encode()) if name.endswith(".gz") else TEXT)
    assert [(row.place.line, row.values["text"]) for row in read(tmp_path, name, **settings)] == expected


def test_utf16_with_its_mark(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "für\nਊ\n".encode("utf-16"))
    assert [row.values["text"] for row in read(tmp_path, "a.txt", encoding="utf-16")] == ["für", "ਊ"]


BIO = "# id = 1\n1\tNew York\tB-LOC\t-\n2\t#\tO\t-\n\t \n\n# id = 2\n3\t's\tO\t-"


def test_bio_columns_comments_and_whitespace_lines(tmp_path: Path) -> None:
    write(tmp_path, "a.iob2", BIO)
    rows = read(tmp_path, "a.iob2", format="tokens", columns={"tokens": "1", "tags": "2"})
    assert numbered(rows) == [
        (2, {"tokens": ["New York", "#"], "tags": ["B-LOC", "O"]}),
        (7, {"tokens": ["'s"], "tags": ["O"]}),
    ]


def test_bio_takes_first_and_last_column_and_a_hash_among_words(tmp_path: Path) -> None:
    write(tmp_path, "a.conll", "# a comment\nEU NNP B-ORG\n# SYM O\n\nis O\n")
    rows = read(tmp_path, "a.conll", format="tokens")
    assert numbered(rows) == [
        (2, {"tokens": ["EU", "#"], "tags": ["B-ORG", "O"]}),
        (5, {"tokens": ["is"], "tags": ["O"]}),
    ]


def test_bio_without_tags(tmp_path: Path) -> None:
    write(tmp_path, "a.bio", "a\nb\n\nc\n")
    assert numbered(read(tmp_path, "a.bio", format="tokens")) == [
        (1, {"tokens": ["a", "b"]}),
        (4, {"tokens": ["c"]}),
    ]


def test_folder_is_read_in_order_without_hidden_files_and_readmes(tmp_path: Path) -> None:
    write(tmp_path, "d/b/x.jsonl", '{"text": "3"}')
    write(tmp_path, "d/a.csv", "text\n1\n")
    write(tmp_path, "d/license_plates.txt", "5")
    write(tmp_path, "d/b/w.txt.gz", gzip.compress(b"2"))
    write(tmp_path, "d/c.txt", "4")
    write(tmp_path, "d/empty.txt", "")
    for name in ("README.md", "LICENSE.upstream", ".hidden", ".git/x.txt", "b/readme.txt"):
        write(tmp_path, f"d/{name}", "no")
    source = Source(path="d", format="classification")
    names = ["a.csv", "b/w.txt.gz", "b/x.jsonl", "c.txt", "empty.txt", "license_plates.txt"]
    assert [file.relative_to(tmp_path / "d").as_posix() for file in files_of(source, tmp_path)] == names
    assert [row.values for row in read(tmp_path, "d")] == [{"text": t} for t in "12345"]
    assert [row.values for row in read(tmp_path, "d", limit=2)] == [{"text": t} for t in "12"]


def test_paths_absolute_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "a.txt", "x")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (str(file), "~/a.txt"):
        assert files_of(Source(path=path, format="text"), Path("/elsewhere")) == [file]


def test_constants_are_added_to_each_row(tmp_path: Path) -> None:
    write(tmp_path, "a.pos", "good\nfine\n")
    rows = read(tmp_path, "a.pos", constants={"label": "pos", "n": 1})
    assert [row.values for row in rows] == [{"text": t, "label": "pos", "n": 1} for t in ("good", "fine")]


def test_builtin_rows_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("tunesmith.data.stdlib")
    module.rows = lambda name: iter([{"t": name}, {"t": "b"}])  # type: ignore[attr-defined]
    module.fingerprint = lambda name: f"{name}-1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tunesmith.data.stdlib", module)
    monkeypatch.setattr("tunesmith.data.stdlib", module, raising=False)
    source = Source(path="builtin:things", format="text")
    assert files_of(source, tmp_path) == []
    assert list(read_rows(source, tmp_path)) == [
        Row({"t": "things"}, Place("builtin:things", 1)),
        Row({"t": "b"}, Place("builtin:things", 2)),
    ]
    before = content_hash(source, tmp_path)
    module.fingerprint = lambda name: f"{name}-2"  # type: ignore[attr-defined]
    assert content_hash(source, tmp_path) != before


def test_hub_labels_become_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features(label=names, tags=datasets.List(names), text=datasets.Value("string"))
    columns = {"label": [1, -1], "tags": [[0, 1], []], "text": ["a", "b"]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read(tmp_path, "hub:owner/name", split="validation")
    assert asked == [("owner/name", "validation")]
    assert rows == [
        Row({"label": "pos", "tags": ["neg", "pos"], "text": "a"}, Place("hub:owner/name[validation]", 1)),
        Row({"label": None, "tags": [], "text": "b"}, Place("hub:owner/name[validation]", 2)),
    ]
    source = Source(path="hub:owner/name", format="text")
    assert content_hash(source, tmp_path) == content_hash(source, tmp_path)


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (
            ConnectionError("no route"),
            MachineError,
            "hub:o/n: the hub cannot be reached: download the files and give their local path",
        ),
        (
            FileNotFoundError("Dataset 'o/n' doesn't exist\nmore"),
            DataError,
            "hub:o/n: Dataset 'o/n' doesn't exist",
        ),
        (ValueError('Unknown split "x".'), DataError, 'hub:o/n: Unknown split "x".'),
    ],
)
def test_hub_faults_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, error: type[Exception], message: str
) -> None:
    import datasets

    def load(name: str, split: str) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(error) as caught:
        read(tmp_path, "hub:o/n")
    assert str(caught.value) == message


def test_content_hash_follows_contents_and_settings_only(tmp_path: Path) -> None:
    write(tmp_path, "one/a.csv", "t,l\na,b\n")
    write(tmp_path, "two/a.csv", "t,l\na,b\n")
    base = Source(path="one/a.csv", format="classification")
    first = content_hash(base, tmp_path)
    assert len(first) == 64
    same = [base.model_copy(update={"path": "two/a.csv"}), base.model_copy(update={"weight": 2.0})]
    assert {content_hash(source, tmp_path) for source in same} == {first}
    changes: list[dict[str, Any]] = [
        {"delimiter": ";"},
        {"header": False},
        {"limit": 1},
        {"constants": {"x": 1}},
        {"columns": {"text": "t"}},
        {"format": "pairs"},
        {"path": "one"},
        {"path": "b.csv"},
    ]
    write(tmp_path, "one/b.csv", "other")
    write(tmp_path, "b.csv", "t,l\na,c\n")
    hashes = {content_hash(base.model_copy(update=change), tmp_path) for change in changes}
    assert len(hashes | {first}) == len(changes) + 1


def test_content_hash_of_a_folder_follows_its_names(tmp_path: Path) -> None:
    source = Source(path="d", format="text")
    write(tmp_path, "d/a.txt", "x")
    write(tmp_path, "d/b.txt", "y")
    before = content_hash(source, tmp_path)
    (tmp_path / "d/b.txt").rename(tmp_path / "d/0.txt")
    assert content_hash(source, tmp_path) != before


@pytest.mark.data
@pytest.mark.parametrize(
    ("path", "settings", "count"),
    [
        ("banking77/train.csv", {}, 10003),
        ("sms_spam/sms.tsv", {"header": False, "quoting": False}, 5574),
        ("wnut17/wnut17train.conll", {"format": "tokens"}, 3394),
        ("wnut17/emerging.dev.conll", {"format": "tokens"}, 1009),
        ("uner_zh_gsdsimp/zh_gsdsimp-ud-train.iob2", {"format": "tokens"}, 3997),
        ("uner_zh_gsdsimp/zh_gsdsimp-ud-dev.iob2", {"format": "tokens"}, 500),
        ("xquad/xquad.en.json", {"format": "squad"}, 1190),
        ("xquad/xquad.vi.json.gz", {"format": "squad"}, 1190),
        ("sentence_polarity/rt-polarity.pos", {}, 4475),
        ("sentence_polarity/rt-polarity.neg", {}, 4517),
        ("medical_abstracts/medical_tc_test.csv.gz", {}, 2888),
        ("hh_rlhf_harmless/harmless-base-test.part.jsonl.gz", {}, 2028),
        ("classic_books/books", {"format": "text"}, 4),
    ],
)
def test_real_files_have_the_rows_that_their_readme_counts(
    data_dir: Path, path: str, settings: dict[str, Any], count: int
) -> None:
    rows = read(data_dir, path, **settings)
    assert len(rows) == count
    assert len({row.place for row in rows}) == count
