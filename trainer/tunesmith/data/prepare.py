"""From the recipe's sources to tables of encoded rows, cached by the hash of all that shapes them.

Done once per machine: whoever takes the lock of a cache entry builds it, the others wait on the lock, which is no
collective and has no time-out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import filelock
import torch

from tunesmith import __version__
from tunesmith.data.augment.stored import EXAMPLE, PART, to_json
from tunesmith.data.augment.transform import keeps_examples
from tunesmith.data.augment.variants import prepare_variants
from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import Example
from tunesmith.data.formats import FormatCounts, examples
from tunesmith.data.order import Segment
from tunesmith.data.rows import content_hash
from tunesmith.data.splitting import Assignment, assign
from tunesmith.data.table import Encoded, Table, finish_table, write_table
from tunesmith.errors import Place, UserError
from tunesmith.objectives import Objective
from tunesmith.recipe.augment import BackTranslation
from tunesmith.recipe.data import Data, Source
from tunesmith.tracking.progress import track

SPLITS = ("train", "eval", "test")


@dataclass(frozen=True, slots=True)
class Dataset:
    """A split's rows and where they came from. `variants`: what back-translation has made of the training rows."""

    name: str
    table: Table
    segments: tuple[Segment, ...]
    variants: Table | None = None

    def __len__(self) -> int:
        return len(self.table)

    def place(self, row: int) -> Place:
        files: list[str] = self.table.meta["files"]
        return Place(files[self.table.value("place_file", row)], self.table.value("place_line", row))

    @property
    def facts(self) -> dict[str, Any]:
        """Rows, tokens, labelled units, and what was dropped or cut, with reasons."""
        made = {} if self.variants is None else {"back_translation": self.variants.meta["counts"]}
        return {"rows": len(self), **self.table.meta["counts"], **made}


def cache_root(data: Data) -> Path:
    """`data.cache_dir`, else TUNESMITH_CACHE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tunesmith"
    return Path(data.cache_dir or os.environ.get("TUNESMITH_CACHE") or default).expanduser()


def split_examples(
    data: Data, base: Path, split: str, counts: FormatCounts | None = None
) -> Iterator[tuple[int, Example]]:
    """(number of the source, example) of a split, in the order of the files."""
    own: Sequence[Source] = getattr(data, split)
    taken = data.split is not None and not own
    sources = data.train if taken else own
    assignment: Assignment | None = (
        assign(data, base) if data.split is not None and (taken or split == "train") else None
    )
    for number, source in enumerate(sources):
        for example in examples(source, base, counts=counts):
            if assignment is None or assignment(example.place) == split:
                yield number, example


def has_split(data: Data, split: str) -> bool:
    return bool(getattr(data, split)) or (data.split is not None and getattr(data.split, split, 0.0) > 0)


def prepare(
    data: Data,
    base: Path,
    objective: Objective,
    tokenizer_hash: str,
    *,
    translate_on: torch.device | None = None,
) -> dict[str, Dataset]:
    """The splits that the recipe has. Fits the objective on the training examples, or restores what an earlier
    fit on the same data found. `translate_on`: where back-translation runs; without it there is none."""
    root = cache_root(data)
    root.mkdir(parents=True, exist_ok=True)
    prepared: dict[str, Dataset] = {}
    for split in SPLITS:
        if has_split(data, split):
            prepared[split] = _prepare_split(data, base, split, objective, tokenizer_hash, root)
    first = data.augment[0] if data.augment else None
    if isinstance(first, BackTranslation) and translate_on is not None:
        train = prepared["train"]
        prepared["train"] = replace(train, variants=prepare_variants(first, train.table, translate_on))
    return prepared


def _key(data: Data, base: Path, split: str, objective: Objective, tokenizer_hash: str) -> str:
    sources = [*data.train, *(getattr(data, split) if split != "train" else [])]
    parts = {
        "sources": [content_hash(source, base) for source in sources],
        "split": [split, None if data.split is None else data.split.model_dump()],
        "objective": objective.fingerprint,
        "tokenizer": tokenizer_hash,
        "keeps_examples": _keeps(data, split, objective),
        "version": __version__,
        "code": _CODE,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _keeps(data: Data, split: str, objective: Objective) -> bool:
    return split == "train" and keeps_examples(data.augment, objective)


def _code_hash() -> str:
    # a change of the reading or encoding code makes old entries unreachable, without a version to bump by hand
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for path in sorted([*(package / "data").rglob("*.py"), *(package / "objectives").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_CODE = _code_hash()


def _prepare_split(
    data: Data, base: Path, split: str, objective: Objective, tokenizer_hash: str, root: Path
) -> Dataset:
    folder = root / f"{split}-{_key(data, base, split, objective, tokenizer_hash)}"
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "table.json").is_file():
            _build(data, base, split, objective, folder)
    table = Table(folder)
    if split == "train":
        objective.load_state(table.meta["objective"])
    segments = tuple(
        Segment(start, stop, source.weight if split == "train" else 1.0)
        for (start, stop), source in zip(
            table.meta["segments"], getattr(data, split) or data.train, strict=True
        )
    )
    return Dataset(split, table, segments)


def _build(data: Data, base: Path, split: str, objective: Objective, folder: Path) -> None:
    if split == "train":
        objective.fit(example for _, example in split_examples(data, base, "train"))
    found = FormatCounts()
    builder = _Builder(objective, split_examples(data, base, split, found), _keeps(data, split, objective))
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        kinds = write_table(temporary, track(builder.rows(), f"encoding {split} rows"), objective.kinds)
        builder.dropped.update(found.dropped)
        builder.changed.update(found.changed)
        if builder.count == 0:
            raise UserError(builder.nothing_left(split))
        meta = builder.meta(len(getattr(data, split) or data.train)) | {"objective": objective.state()}
        finish_table(temporary, kinds, meta)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Builder:
    """Encodes examples and keeps count of everything that happens to them; where it `keeps_examples`, the rows have
    them beside what was encoded."""

    def __init__(
        self, objective: Objective, source: Iterator[tuple[int, Example]], keeps_examples: bool
    ) -> None:
        self.objective = objective
        self.source = source
        self.keeps_examples = keeps_examples
        self.number = 0
        self.count = 0
        self.read = 0
        self.tokens = 0
        self.truncated = 0
        self.dropped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.example_of: dict[str, Place] = {}
        self.files: dict[str, int] = {}
        self.ends: dict[int, int] = {}

    def _examples(self) -> Iterator[Example]:
        for number, example in self.source:
            self.number = number
            self.read += 1
            if not isinstance(example, self.objective.accepts):
                names = " or ".join(kind.__name__ for kind in self.objective.accepts)
                raise UserError(
                    f"data: {example.place.file} gives {type(example).__name__} examples, "
                    f"the objective takes {names}: choose another format"
                )
            yield example

    def rows(self) -> Iterator[Encoded]:
        last, part = None, 0
        for example, row in self.objective.encode_all(self._examples()):
            part = part + 1 if example is last else 0
            last = example
            if isinstance(row, Dropped):
                self.dropped[row.reason] += 1
                self.example_of.setdefault(row.reason, example.place)
                continue
            file = self.files.setdefault(example.place.file, len(self.files))
            self.count += 1
            self.ends[self.number] = self.count
            self.tokens += len(row["input_ids"])
            self.truncated += int(row.pop("truncated", 0))
            if (reason := row.pop("changed", None)) is not None:
                self.changed[reason] += 1
            kept: Encoded = {EXAMPLE: to_json(example), PART: part} if self.keeps_examples else {}
            yield row | kept | {"place_file": file, "place_line": example.place.line}

    def nothing_left(self, split: str) -> str:
        if not self.dropped:
            return f"data.{split}: there are no rows"
        reason, number = self.dropped.most_common(1)[0]
        place = self.example_of.get(reason)
        example = f", for example {place}" if place is not None else ""
        return f"data.{split}: none of the {self.read} rows can be used: {number} × {reason}{example}"

    def meta(self, sources: int) -> dict[str, Any]:
        edges = [0]
        for number in range(sources):
            edges.append(self.ends.get(number, edges[-1]))
        counts = {
            "examples": self.read,
            "tokens": self.tokens,
            "truncated": self.truncated,
            "dropped": dict(self.dropped),
            "changed": dict(self.changed),
            "dropped_example": {reason: str(place) for reason, place in self.example_of.items()},
        }
        return {
            "files": list(self.files),
            "segments": list(pairwise(edges)),
            "counts": counts,
        }
