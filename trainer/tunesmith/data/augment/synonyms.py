"""Synonyms from a user's table, or from WordNet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tunesmith.data.augment.operations import Synonyms
from tunesmith.data.opening import inner_name, open_text
from tunesmith.errors import DataError, MachineError, Place


def of_table(path: Path) -> Synonyms:
    """TSV: a word, then its synonyms, one to a cell; JSON: {word: [synonym, …]}. Words are looked up in lower case.
    DataError for a file that is neither."""
    table = _read(path)
    return lambda word: table.get(word, ())


def words_of_table(path: Path) -> int:
    """How many words have synonyms in it."""
    return sum(map(bool, _read(path).values()))


def _read(path: Path) -> Mapping[str, tuple[str, ...]]:
    found = _json(path) if inner_name(path.name).endswith(".json") else _tsv(path)
    table: dict[str, tuple[str, ...]] = {}
    for word, others in found.items():
        lower = word.strip().lower()
        cleaned = [other.strip() for other in others]
        kept = [other for other in cleaned if other and other.lower() != lower]
        table[lower] = tuple(dict.fromkeys((*table.get(lower, ()), *kept)))
    if not any(table.values()):
        raise DataError(f"{path}: no word of the table has a synonym")
    return table


def _tsv(path: Path) -> Mapping[str, Sequence[str]]:
    table: dict[str, list[str]] = {}
    with open_text(path, "utf-8") as file:
        for number, line in enumerate(file, start=1):
            cells = line.rstrip("\r\n").split("\t")
            if cells == [""] or cells[0].startswith("#"):
                continue
            if len(cells) < 2:
                raise DataError("a word, then its synonyms, with tabs between", Place(str(path), number))
            table.setdefault(cells[0], []).extend(cells[1:])
    return table


def _json(path: Path) -> Mapping[str, Sequence[str]]:
    with open_text(path, "utf-8") as file:
        try:
            found: Any = json.load(file)
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON: {error.msg}", Place(str(path), error.lineno)) from error
    good = isinstance(found, dict) and all(
        isinstance(others, list) and all(isinstance(other, str) for other in others)
        for others in found.values()
    )
    if not good:
        raise DataError(f"{path}: not a table of synonyms: {{word: [synonym, …]}}")
    return found


def of_wordnet() -> Synonyms:
    """The lemmas of all synsets of a word in the English WordNet (Miller 1995), in NLTK's order, the most frequent
    sense first. MachineError where NLTK or its data is not there: nothing is downloaded."""
    try:
        from nltk.corpus import wordnet
    except ImportError as error:
        raise MachineError(
            "data.augment: source: wordnet needs nltk: pip install 'tunesmith[wordnet]'"
        ) from error
    reader: Any = wordnet
    try:
        reader.ensure_loaded()
    except LookupError as error:
        raise MachineError(
            "data.augment: source: wordnet: the WordNet data are not on this machine: run `python -m nltk.downloader "
            "wordnet` where there is a network, copy the folder nltk_data, and set NLTK_DATA to it; or give a table"
        ) from error

    @lru_cache(maxsize=1 << 16)
    def lookup(word: str) -> Sequence[str]:
        names = [name for synset in reader.synsets(word) for name in synset.lemma_names()]
        texts = [name.replace("_", " ") for name in names]
        return tuple(text for text in dict.fromkeys(texts) if text.lower() != word)

    return lookup
