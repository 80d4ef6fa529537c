"""Rows that belong to no recipe: a file or a text to predict, another file to evaluate on. They are encoded into a
folder of the caller's, not into the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import (
    Chat,
    Example,
    Labelled,
    Message,
    SourceTarget,
    Text,
    Tokens,
)
from tunesmith.data.formats import examples
from tunesmith.data.opening import BIO_SUFFIXES, data_files, inner_name, kind_of
from tunesmith.data.order import Segment
from tunesmith.data.prepare import Dataset
from tunesmith.data.rows import read_rows
from tunesmith.data.table import Encoded, Table, finish_table, write_table
from tunesmith.errors import Place, UserError
from tunesmith.objectives import Objective
from tunesmith.objectives.causal_lm import DecoderObjective
from tunesmith.recipe import Recipe
from tunesmith.recipe.data import Source


@dataclass(frozen=True, slots=True)
class Encoding:
    """`rows[i]` are the rows of example i in the dataset (windows of one context are several); none where it was
    `dropped` for a reason. `truncated` are the examples that lost a part."""

    dataset: Dataset
    rows: list[list[int]]
    dropped: dict[int, str]
    truncated: frozenset[int]

    @property
    def reasons(self) -> dict[str, int]:
        return dict(Counter(self.dropped.values()))


def encode_examples(
    given: Iterable[Example], objective: Objective, folder: Path, name: str, *, prompts: bool = False
) -> Encoding:
    """Encodes the examples into a table in the new folder `folder`. With `prompts` a decoder's rows end where
    generation begins. Raises UserError where the examples are not what the objective takes."""
    encoder = _Encoder(objective, prompts)
    kinds = write_table(folder, encoder.encoded(given), objective.kinds)
    finish_table(folder, kinds, {"files": list(encoder.files)})
    table = Table(folder)
    dataset = Dataset(name, table, (Segment(0, len(table)),))
    return Encoding(dataset, encoder.rows, encoder.dropped, frozenset(encoder.truncated))


class _Encoder:
    def __init__(self, objective: Objective, prompts: bool) -> None:
        self.objective = objective
        self.prompts = prompts
        self.files: dict[str, int] = {}
        self.rows: list[list[int]] = []
        self.dropped: dict[int, str] = {}
        self.truncated: set[int] = set()

    def encoded(self, given: Iterable[Example]) -> Iterator[Encoded]:
        """The rows, with their places."""
        numbers: dict[int, int] = {}
        kept: list[Example] = []  # keeps the identities in `numbers` unique
        count = 0

        def accepted() -> Iterator[Example]:
            for number, example in enumerate(given):
                self._check(example)
                numbers[id(example)] = number
                kept.append(example)
                self.rows.append([])
                yield example

        for example, row in self._pairs(accepted()):
            number = numbers[id(example)]
            if isinstance(row, Dropped):
                self.dropped[number] = row.reason
                continue
            self.rows[number].append(count)
            count += 1
            row.pop("changed", None)
            if row.pop("truncated", 0):
                self.truncated.add(number)
            file = self.files.setdefault(example.place.file, len(self.files))
            yield row | {"place_file": file, "place_line": example.place.line}

    def _pairs(self, given: Iterator[Example]) -> Iterator[tuple[Example, Encoded | Dropped]]:
        objective = self.objective
        if self.prompts and isinstance(objective, DecoderObjective):
            return ((example, objective.prompt_row(example)) for example in given)
        return objective.encode_all(given)

    def _check(self, example: Example) -> None:
        accepts = self.objective.accepts
        if not isinstance(example, accepts):
            names = " or ".join(kind.__name__ for kind in accepts)
            raise UserError(
                f"{example.place.file} gives {type(example).__name__} examples, the objective takes {names}: "
                "choose another format"
            )


def source_like(recipe: Recipe, path: str) -> Source:
    """A file or folder of the same format and columns as the recipe's first training source. What only says how
    that source is written is kept where the new one is written in the same way."""
    like = recipe.data.train[0]
    if path.startswith(("hub:", "builtin:")):
        return Source(path=path, format=like.format, columns=like.columns)
    names = [inner_name(file.name) for file in data_files(Path(path))]
    kinds = {kind_of(Path(name)) for name in names}
    was_bio = inner_name(like.path).endswith(BIO_SUFFIXES)
    same = recipe.data.train[0].constants
    return Source(
        path=path,
        format=like.format,
        columns=like.columns if was_bio == (kinds == {"bio"}) else {},
        constants=same if all(source.constants == same for source in recipe.data.train) else {},
        encoding="utf-8" if kinds == {"parquet"} else like.encoding,
        delimiter=like.delimiter if "csv" in kinds else None,
        header=like.header or "csv" not in kinds,
        quoting=like.quoting or "csv" not in kinds,
        split_by=like.split_by if "text" in kinds else "auto",
    )


def unlabelled_examples(recipe: Recipe, path: str) -> Iterator[Example]:
    """The rows of a file to predict: of the recipe's format, its labels not needed, or the lines of a plain-text
    file."""
    source = source_like(recipe, path)
    if path.startswith(("hub:", "builtin:")) or {kind_of(file) for file in data_files(Path(path))} != {
        "text"
    }:
        label_constants = source.model_copy(update={"constants": {}})
        yield from examples(label_constants, Path(), need_labels=False)
        return
    lines = Source(path=path, format="text", split_by="line", encoding=source.encoding)
    for row in read_rows(lines, Path()):
        yield from plain_examples(recipe, [row.values["text"]], row.place)


def plain_examples(recipe: Recipe, texts: Iterable[str], place: Place | None = None) -> Iterator[Example]:
    """Texts as what the objective takes: a user's message, words, a source, … Places number them where none is
    given."""
    for number, text in enumerate(texts, start=1):
        yield _plain_example(recipe, text, place or Place("--text", number))


def _plain_example(recipe: Recipe, text: str, place: Place) -> Example:
    match recipe.objective.type:
        case "sft":
            return Chat((Message("user", text),), place)
        case "seq2seq":
            return SourceTarget(text, (), place)
        case "token_classification":
            return Tokens(tuple(text.split()), None, place)
        case "classification" if recipe.data.train[0].format != "pairs":
            return Labelled(text, None, place)
        case "classification" | "question_answering":
            raise UserError(
                f"{place}: a row has two texts: give a file of format {recipe.data.train[0].format}, not plain text"
            )
        case "causal_lm" | "masked_lm" | "span_corruption":
            return Text(text, place)
