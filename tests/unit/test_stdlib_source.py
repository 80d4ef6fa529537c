"""The builtin sources made from Python's standard library, on the real one and on a small invented one."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data import stdlib
from tunesmith.data.near_duplicates import representatives
from tunesmith.errors import MachineError, UserError

Rows = list[dict[str, Any]]
PACKAGED_APART = {"idlelib", "lib2to3", "tkinter", "turtle"}
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages", *PACKAGED_APART}


@pytest.fixture(scope="module")
def docstrings() -> Rows:
    return list(stdlib.rows("stdlib_docstrings"))


@pytest.fixture(scope="module")
def functions() -> Rows:
    return list(stdlib.rows("stdlib_functions"))


@pytest.fixture(scope="module")
def sources() -> Rows:
    return list(stdlib.rows("stdlib_sources"))


@pytest.fixture
def invented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library in which every label has one module without docstrings."""
    for label in stdlib.LABELS:
        (tmp_path / f"{label}.py").write_text("x = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    return tmp_path


def write(root: Path, file: str, text: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text, encoding="utf-8")


def shingle_set(text: str) -> set[tuple[str, ...]]:
    """The words and neighbouring words, written anew, without the module under test."""
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text.casefold()).split()
    return {(word,) for word in words} | {tuple(words[i : i + 2]) for i in range(len(words) - 1)}


def jaccard(first: set[tuple[str, ...]], second: set[tuple[str, ...]]) -> float:
    return len(first & second) / len(first | second)


def highest_similarity(texts: list[str]) -> float:
    """Of any two of the texts, by trying all pairs."""
    return max(jaccard(*pair) for pair in combinations(map(shingle_set, texts), 2))


# --- near-duplicates ---


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.75, 1.0])
def test_representatives_are_those_of_a_search_through_all_pairs(threshold: float) -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcdefg", k=draw.randint(1, 6))) for _ in range(250)]
    sets = [shingle_set(text) for text in texts]
    expected: list[int] = []
    for i in range(len(texts)):
        standing = [j for j in range(i) if expected[j] == j]
        expected.append(next((j for j in standing if jaccard(sets[j], sets[i]) >= threshold), i))
    assert representatives(texts, threshold) == expected
    assert len(set(expected)) < len(texts)


def test_case_and_punctuation_do_not_make_a_text_another_and_word_order_does() -> None:
    texts = ["Close the file.", "close THE file", "file the close", "...", "!!!"]
    assert representatives(texts, 0.9) == [0, 0, 2, 3, 4]


# --- docstrings ---


def test_every_label_has_at_least_50_rows_and_no_group_with_most_of_them(docstrings: Rows) -> None:
    counts = Counter(row["label"] for row in docstrings)
    assert set(counts) == set(stdlib.LABELS)
    assert len(counts) >= 10
    assert min(counts.values()) >= 50, counts
    largest = Counter((row["label"], row["group"]) for row in docstrings)
    for (label, group), rows in largest.items():
        assert rows <= counts[label] / 2, group


def test_a_group_has_one_label_and_holds_what_its_name_begins(docstrings: Rows) -> None:
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for row in docstrings:
        labels[row["group"]].add(row["label"])
        assert f"{row['name']}.".startswith(f"{row['group']}.")
    assert all(len(found) == 1 for found in labels.values())
    assert len(labels) > 1000
    assert sum(row["group"] == "logging.Logger" for row in docstrings) > 5


def test_no_two_texts_are_near_duplicates(docstrings: Rows) -> None:
    # the labels in which most are before the removal, and a sample of all
    dense = [row["text"] for row in docstrings if row["label"] in {"decimal", "logging", "mailbox"}]
    sample = random.Random(0).sample([row["text"] for row in docstrings], 150)
    assert 0.4 < highest_similarity(sorted({*dense, *sample})) < 0.6


def test_texts_are_prose_that_no_package_prefix_gives_away(docstrings: Rows) -> None:
    prefix = re.compile(rf"(?:^|[\s(`'\"])(?:{'|'.join(stdlib.LABELS)})\.\w")
    for row in docstrings:
        assert not prefix.search(row["text"]), row["name"]
        assert not re.search(r"^\s*>>> ", row["text"], re.MULTILINE), row["name"]
        assert len(row["text"]) >= 30
        assert row["text"] == row["text"].strip()


def test_answering_with_the_label_that_the_text_names_is_mostly_wrong(docstrings: Rows) -> None:
    right = sum(bool(re.search(rf"\b{row['label']}\b", row["text"], re.IGNORECASE)) for row in docstrings)
    assert right / len(docstrings) < 0.15


def test_docstrings_of_an_invented_library(invented: Path) -> None:
    module = '''"""Sends letters and parcels to friends abroad."""
import nowhere  # parsed, never imported

class Box:
    """A box that asyncio.Queue and email.message.Message share, by name.

    >>> import email
    >>> email.Box()
    Box

    Its lid opens.
    """

    if True:
        @property
        def lid(self):
            """The lid that closes the box from above."""
            def hinge():
                """Turns the lid around its longer edge."""

def short():
    """Too short."""
'''
    write(invented, "email/parcels.py", module)
    for file in ("email/test/test_parcels.py", "email/tests/parcels.py", "site-packages/email/parcels.py"):
        write(invented, file, '"""Never seen: a module that nobody may read."""')
    rows = [(row["name"], row["group"], row["text"]) for row in stdlib.rows("stdlib_docstrings")]
    box = "email.parcels.Box"
    assert rows == [
        ("email.parcels", "email.parcels", "Sends letters and parcels to friends abroad."),
        (box, box, "A box that Queue and message.Message share, by name.\n\nIts lid opens."),
        (f"{box}.lid", box, "The lid that closes the box from above."),
        (f"{box}.lid.hinge", box, "Turns the lid around its longer edge."),
    ]
    assert {row["label"] for row in stdlib.rows("stdlib_docstrings")} == {"email"}


def test_what_two_packages_share_is_in_neither_and_implementations_count_for_their_module(
    invented: Path,
) -> None:
    write(invented, "email.py", '"""Return the current position in the file."""')
    write(invented, "http.py", '"""Return the current position in the file, now."""')
    write(invented, "_pyio.py", '"""Reads bytes out of a raw stream, buffered."""\n')
    write(invented, "io.py", '"""Reads bytes out of a raw stream, buffered."""\n')
    rows = list(stdlib.rows("stdlib_docstrings"))
    assert [(row["label"], row["name"]) for row in rows] == [("io", "_pyio")]


# --- functions ---


def test_prompts_are_functions_without_any_docstring(functions: Rows) -> None:
    assert len(functions) > 2000
    for row in functions:
        tree = ast.parse(row["prompt"])
        (function,) = tree.body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert function.name == row["name"].rpartition(".")[2]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                assert ast.get_docstring(node) is None, row["name"]
        assert "\n" not in row["answer"]
        assert 20 <= len(row["answer"]) < 300
        assert 100 <= len(row["prompt"]) < 1500
        assert f"{row['name']}.".startswith(f"{row['group']}.")


def test_no_two_prompts_are_near_duplicates(functions: Rows) -> None:
    modules = ("ftplib", "imaplib", "ntpath", "posixpath")
    prompts = [row["prompt"] for row in functions if row["name"].startswith(modules)]
    assert len(prompts) > 60
    assert 0.4 < highest_similarity(prompts) < 0.7


def test_functions_of_an_invented_library(invented: Path) -> None:
    write(
        invented,
        "json/boxes.py",
        '''
class Box:
    @staticmethod
    async def fold(
        paper, times=3
    ):  # note
        """Fold the paper,
        some times.

        Then stop.
        """
        def once(sheet):
            """Nested."""
            return sheet.half("""one
  two""")
        \x0c
        return [once(paper) for _ in range(times)]

    def behind(self, first_parameter, second_parameter, third_parameter):
        """A docstring that has code behind it."""; total = first_parameter + second_parameter
        return total + third_parameter

    def only(self, a_first_parameter, a_second_parameter, a_third_parameter, a_fourth_parameter, a_fifth):
        """A docstring that is the whole body."""
''',
    )
    (row,) = stdlib.rows("stdlib_functions")
    assert (row["name"], row["group"]) == ("json.boxes.Box.fold", "json.boxes.Box")
    assert row["answer"] == "Fold the paper, some times."
    assert row["prompt"].splitlines()[:6] == [
        "@staticmethod",
        "async def fold(",
        "    paper, times=3",
        "):  # note",
        "    def once(sheet):",
        '        return sheet.half("""one',
    ]
    assert row["prompt"].endswith("\n    return [once(paper) for _ in range(times)]")


# --- sources ---


def test_sources_are_a_few_megabytes_of_whole_modules(sources: Rows) -> None:
    assert 3e6 < sum(len(row["text"]) for row in sources) < 8e6
    texts = {row["name"]: row["text"] for row in sources}
    assert len(texts) == len(sources) > 250
    decoder = Path(sysconfig.get_path("stdlib"), "json", "decoder.py")
    assert texts["json.decoder"] == decoder.read_text(encoding="utf-8")
    assert all(len(text.encode()) <= 65_536 for text in texts.values())
    assert not {"stringprep", "re._casefix", "token", "keyword", "html.entities"} & set(texts)  # tables


def test_sources_of_an_invented_library(invented: Path) -> None:
    body = "value = 'äöü'\n" * 50
    write(invented, "json/__init__.py", body)
    (invented / "csv.py").write_text("# -*- coding: latin-1 -*-\n" + body, encoding="latin-1")
    write(invented, "cmd.py", "# Auto-generated by a script, do not edit\n" + body)
    write(invented, "token.py", '"""This file is automatically generated."""\n' + body)
    write(invented, "tabnanny.py", "# generated by hand?\n" * 10_000)
    elsewhere = (
        "turtle.py",
        "encodings/big5.py",
        "unittest/test/case.py",
        "mine.py",
        "site-packages/json.py",
    )
    for file in elsewhere:
        write(invented, file, body)
    rows = list(stdlib.rows("stdlib_sources"))
    assert [row["name"] for row in rows] == ["csv", "json"]
    assert rows[0]["text"].endswith(body)


# --- all of them ---


@pytest.mark.parametrize("fixture", ["docstrings", "functions", "sources"])
def test_nothing_comes_from_tests_tables_or_parts_packaged_separately(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    for row in request.getfixturevalue(fixture):
        parts = row["name"].split(".")
        assert parts[0] in sys.stdlib_module_names - LEFT_OUT
        # a function may well be called test: only the names around it count
        folders = row["group"].split(".")[:-1] if "group" in row else parts
        assert not LEFT_OUT.intersection(folders), row["name"]


@pytest.mark.parametrize("fixture", ["docstrings", "functions"])
def test_the_rows_do_not_depend_on_the_process(fixture: str, request: pytest.FixtureRequest) -> None:
    here = json.dumps(request.getfixturevalue(fixture)).encode()
    code = (
        "import hashlib, json, sys; from tunesmith.data.stdlib import rows; "
        "print(hashlib.sha256(json.dumps(list(rows(sys.argv[1]))).encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", code, f"stdlib_{fixture}"]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == hashlib.sha256(here).hexdigest()


def test_fingerprint_follows_the_source_and_the_files(invented: Path) -> None:
    first = stdlib.fingerprint("stdlib_sources")
    assert first == stdlib.fingerprint("stdlib_sources")
    assert first != stdlib.fingerprint("stdlib_docstrings")
    assert ".".join(map(str, sys.version_info[:3])) in first
    write(invented, "email.py", "x = 22\n")
    assert first != stdlib.fingerprint("stdlib_sources")


@pytest.mark.parametrize("call", [stdlib.rows, stdlib.fingerprint])
def test_an_unknown_name_is_refused_before_the_first_row(call: Any) -> None:
    with pytest.raises(UserError, match=r"no such builtin source; did you mean builtin:stdlib_docstrings\?"):
        call("stdlib_docstring")
    with pytest.raises(UserError, match="there are stdlib_docstrings, stdlib_functions, stdlib_sources"):
        call("imdb")


def test_a_python_without_its_sources_is_named(
    invented: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (invented / "email.py").rename(invented / "email.pyc")
    with pytest.raises(MachineError, match=r"without the sources of email \(zipped"):
        stdlib.rows("stdlib_sources")
    zipped = str(tmp_path / "python311.zip")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: zipped)
    with pytest.raises(MachineError, match=r"python311\.zip: .* asyncio, collections, "):
        stdlib.fingerprint("stdlib_functions")


def test_an_unreadable_file_is_named(invented: Path) -> None:
    (invented / "http.py").unlink()
    (invented / "http.py").mkdir()
    with pytest.raises(MachineError, match=r"http\.py: .* not readable"):
        list(stdlib.rows("stdlib_docstrings"))
