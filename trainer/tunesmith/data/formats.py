"""From rows to examples: what each format's columns mean."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.data import formats_chat
from tunesmith.data.cells import Cells, found
from tunesmith.data.examples import (
    Answer,
    Example,
    Question,
    SourceTarget,
    Text,
    Tokens,
)
from tunesmith.data.formats_labels import labelled
from tunesmith.data.opening import BIO_SUFFIXES, did_you_mean, inner_name
from tunesmith.data.rows import Row, read_rows
from tunesmith.errors import DataError
from tunesmith.recipe.data import Format, Source

# the names that `columns` may map
_COLUMNS: dict[Format, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_answer": ("prompt", "answer", "system"),
    "alpaca": ("instruction", "input", "output", "history", "system"),
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "classification": ("text", "label", "soft_labels", "group"),
    "pairs": ("text", "text_pair", "label", "soft_labels", "group"),
    "tokens": ("tokens", "tags"),
    "squad": ("id", "question", "context", "answers"),
    "translation": ("source", "target"),
}
_LABELS = {"answer", "output", "label", "soft_labels", "group", "tags", "answers", "target"}


@dataclass
class FormatCounts:
    """What became of rows that are not as they should be, reason → number: `dropped` rows are left out,
    `changed` ones are repaired."""

    dropped: dict[str, int] = field(default_factory=dict[str, int])
    changed: dict[str, int] = field(default_factory=dict[str, int])

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def change(self, reason: str) -> None:
        self.changed[reason] = self.changed.get(reason, 0) + 1


def examples(
    source: Source, base: Path, *, need_labels: bool = True, counts: FormatCounts | None = None
) -> Iterator[Example]:
    """The source's rows as the examples that its format gives, in order. Without `need_labels` (prediction)
    the columns of labels, answers and targets may be missing. DataError for a value of the wrong type, a
    missing column, a setting that does not fit; rows that are left out are counted in `counts`."""
    _check_columns(source)
    counts = counts if counts is not None else FormatCounts()
    unseen = _named_columns(source, need_labels)
    there: list[str] = []
    for row in read_rows(source, base):
        if _is_bio(row.place.file):
            cells, unseen = Cells(row, {}), {}  # the reader has used the columns, which are numbers
        else:
            row = _flat(row) if source.format == "translation" else row
            cells = Cells(row, source.columns)
        if unseen:
            there = list(row.values)
            unseen = {name: key for name, key in unseen.items() if name not in row.values}
        example = _example(source, cells, need_labels, counts)
        if example is not None:
            yield example
    for name, key in unseen.items():
        hint = did_you_mean(name, there)
        raise DataError(f"{source.path}: columns: {key}: no row has a column {name}{hint}")


def _check_columns(source: Source) -> None:
    known = _COLUMNS[source.format]
    for key, name in source.columns.items():
        if key not in known:
            what = f"format {source.format} has no {key}, but {', '.join(known)}{did_you_mean(key, known)}"
            raise DataError(f"{source.path}: columns: {what}")
        if isinstance(name, list) and (key != "label" or not name):
            raise DataError(f"{source.path}: columns: {key}: must name one column")


def _named_columns(source: Source, need_labels: bool) -> dict[str, str]:
    """The file's columns that the recipe names, each with the format's name; a typo in an optional one would
    otherwise pass without a word."""
    keys = {key: name for key, name in source.columns.items() if need_labels or key not in _LABELS}
    return {
        name: key for key, names in keys.items() for name in (names if isinstance(names, list) else [names])
    }


def _is_bio(file: str) -> bool:
    return inner_name(file).endswith(BIO_SUFFIXES)


def _flat(row: Row) -> Row:
    """Hub data sets nest the languages: {translation: {en: …, de: …}}."""
    nested = row.values.get("translation")
    return Row(row.values | nested, row.place) if isinstance(nested, dict) else row


def _example(source: Source, cells: Cells, need_labels: bool, counts: FormatCounts) -> Example | None:
    """None for a row that is left out, and counted."""
    match source.format:
        case "text":
            return Text(cells.text("text"), cells.row.place)
        case "prompt_answer":
            return formats_chat.prompt_answer(cells, need_labels)
        case "alpaca":
            return formats_chat.alpaca(cells, need_labels)
        case "messages":
            return formats_chat.messages(cells, need_labels)
        case "sharegpt":
            return formats_chat.sharegpt(cells, need_labels)
        case "classification" | "pairs":
            pair = cells.text("text_pair") if source.format == "pairs" else None
            return labelled(source, cells, need_labels, pair)
        case "tokens":
            return _tokens(cells, need_labels)
        case "squad":
            return _question(cells, need_labels, counts)
        case "translation":
            return _source_target(cells, need_labels)


def _tokens(cells: Cells, need_labels: bool) -> Tokens:
    words = cells.list_of("tokens", cells.get("tokens"))
    if not words:
        raise cells.error("tokens", "the list is empty")
    tokens = tuple(cells.text_of("tokens", word, f"token {i}") for i, word in enumerate(words, start=1))
    value = cells.get("tags") if need_labels else cells.find("tags")
    if not need_labels and value is None:
        return Tokens(tokens, None, cells.row.place)
    tags: list[str] = []
    for i, tag in enumerate(cells.list_of("tags", value), start=1):
        is_number = isinstance(tag, int) and not isinstance(tag, bool)
        tags.append(cells.text_of("tags", str(tag) if is_number else tag, f"tag {i}"))
    if len(tags) != len(tokens):
        raise cells.error("tags", f"tags: {len(tags)}, but tokens: {len(tokens)}; each token has one")
    return Tokens(tokens, tuple(tags), cells.row.place)


def _source_target(cells: Cells, need_labels: bool) -> SourceTarget:
    source = cells.get("source")
    if isinstance(source, list | tuple):
        source = " ".join(cells.text_of("source", part) for part in source)
    target = cells.get("target") if need_labels else cells.find("target")
    targets: list[Any] = list(target) if isinstance(target, list | tuple) else [target]
    if target is None and not need_labels:
        targets = []
    if need_labels and not targets:
        raise cells.error("target", "the list is empty")
    texts = tuple(cells.text_of("target", one) for one in targets)
    return SourceTarget(cells.text_of("source", source), texts, cells.row.place)


def _question(cells: Cells, need_labels: bool, counts: FormatCounts) -> Question | None:
    context = cells.text("context")
    given = _answers(cells, need_labels)
    kept: list[Answer] = []
    for answer in given:
        start = _nearest(context, answer)
        if start is None:
            counts.change("answer left out: not in its context")
            continue
        if start != answer.start:
            counts.change("answer_start moved to the answer's text")
        kept.append(Answer(answer.text, start))
    if need_labels and given and not kept:
        counts.drop("answer not in its context")
        return None
    number = cells.find("id")
    name = str(cells.row.place) if number is None else str(number)
    return Question(name, cells.text("question"), context, tuple(kept), cells.row.place)


def _nearest(context: str, answer: Answer) -> int | None:
    """The occurrence of the answer's text that is nearest to its start."""
    if not answer.text:
        return None
    best: int | None = None
    at = context.find(answer.text)
    while at >= 0:
        if best is None or abs(at - answer.start) < abs(best - answer.start):
            best = at
        at = context.find(answer.text, at + 1)
    return best


def _answers(cells: Cells, need_labels: bool) -> list[Answer]:
    """SQuAD's [{text, answer_start}, …], or the hub's {text: […], answer_start: […]}."""
    value = cells.get("answers") if need_labels else cells.find("answers")
    if value is None and not need_labels:
        return []
    if isinstance(value, dict):
        texts = cells.list_of("answers", value.get("text"), "text")
        starts = cells.list_of("answers", value.get("answer_start"), "answer_start")
        if len(texts) != len(starts):
            raise cells.error("answers", f"texts: {len(texts)}, but answer_start: {len(starts)}")
        pairs = list(zip(texts, starts, strict=True))
    else:
        objects = cells.objects("answers", cells.list_of("answers", value))
        pairs = [(one.get("text"), one.get("answer_start")) for one in objects]
    answers: list[Answer] = []
    for number, (text, start) in enumerate(pairs, start=1):
        if isinstance(start, bool) or not isinstance(start, int):
            raise cells.error(
                "answers",
                f"answer {number}: answer_start: must be a number of characters, not {found(start)}",
            )
        answers.append(Answer(cells.text_of("answers", text, f"answer {number}: text"), start))
    return answers
