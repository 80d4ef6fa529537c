"""`tunesmith preview`: samples as the model sees them, what is trained in them, and how long the rows are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from tunesmith.commands.check_data import spread
from tunesmith.commands.preview_augment import augmented
from tunesmith.commands.preview_samples import Sample, sample
from tunesmith.data.encoded import Dropped
from tunesmith.data.prepare import Dataset, has_split, prepare, split_examples
from tunesmith.engine import device_type
from tunesmith.errors import UserError
from tunesmith.objectives import Objective, build_objective
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
from tunesmith.recipe.paths import resolve_paths
from tunesmith.streams import build_stream
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash

_BINS, _BAR = 10, 40
_PACKED_STEPS = 200


@dataclass(frozen=True, slots=True)
class Bin:
    """`rows` of `first` to `last` tokens."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True, slots=True)
class Packing:
    """Over the first `steps` steps: `tokens` of rows in `sequences` of `max_length` places."""

    steps: int
    sequences: int
    tokens: int
    max_length: int

    @property
    def efficiency(self) -> float:
        return self.tokens / (self.sequences * self.max_length)


@dataclass(frozen=True, slots=True)
class Preview:
    split: str
    rows: int
    samples: list[Sample]
    lengths: list[Bin]
    max_length: int
    packing: Packing | None
    notes: list[str]


def preview(recipe: Recipe, base: Path, split: str = "train", rows: int = 4) -> Preview:
    """`rows` samples, evenly spread through the split, those of `train` also as they are augmented, and what is to know
    about all of it. Raises UserError for a split that the recipe does not have."""
    quiet_libraries()
    recipe = resolve_paths(recipe, base)
    if not has_split(recipe.data, split):
        raise UserError(
            f"--split {split}: the recipe has no such rows; set data.{split} or data.split.{split}"
        )
    tokenizer, notes = tokenizer_for(recipe, base)
    objective = build_objective(recipe, tokenizer)
    device = torch.device(device_type())
    datasets = prepare(recipe.data, base, objective, tokenizer_hash(tokenizer), translate_on=device)
    dataset = datasets[split]
    chosen = spread(len(dataset), rows).tolist()
    samples = [sample(objective, dataset, row, recipe.training.seed) for row in chosen]
    if split == "train" and recipe.data.augment:
        stream = build_stream(recipe, dataset, objective)
        samples = [
            replace(one, parts=[*one.parts, *augmented(recipe, stream, row)])
            for one, row in zip(samples, chosen, strict=True)
        ]
    return Preview(
        split,
        len(dataset),
        samples,
        histogram(dataset.table.lengths(), recipe.data.max_length),
        recipe.data.max_length,
        _packing(recipe, datasets["train"], objective) if recipe.data.packing else None,
        [*notes, *objective.notes(), *_left_out(recipe, base, split, dataset, objective)],
    )


def histogram(lengths: Any, max_length: int) -> list[Bin]:
    """At most ten bins of equal width from 1 to the longest row, or to `max_length` where that is more."""
    top = max(int(np.max(lengths)), max_length)
    width = -(-top // _BINS)
    counts = np.bincount((np.asarray(lengths) - 1) // width, minlength=-(-top // width))
    return [Bin(i * width + 1, (i + 1) * width, int(count)) for i, count in enumerate(counts)]


def _packing(recipe: Recipe, train: Dataset, objective: Objective) -> Packing:
    stream = build_stream(recipe, train, objective)
    lengths, steps = train.table.lengths(), min(stream.steps_per_epoch, _PACKED_STEPS)
    sequences = [
        sequence
        for step in range(steps)
        for ranks in stream.cells(step, 1)
        for cell in ranks
        for sequence in cell
    ]
    tokens = sum(int(lengths[sequence].sum()) for sequence in sequences)
    return Packing(steps, len(sequences), tokens, recipe.data.max_length)


def _left_out(
    recipe: Recipe, base: Path, split: str, dataset: Dataset, objective: Objective
) -> Iterator[str]:
    facts = dataset.facts
    for reason, count in facts["dropped"].items():
        place = facts["dropped_example"].get(reason)
        yield f"{count:,} dropped: {reason}" + (f", such as {place}" if place else "")
    for what, count in facts["changed"].items():
        yield f"{count:,} changed: {what}"
    if facts["truncated"]:
        place = _first_truncated(recipe, base, split, objective)
        yield f"{facts['truncated']:,} truncated to max_length {recipe.data.max_length}, such as {place}"


def _first_truncated(recipe: Recipe, base: Path, split: str, objective: Objective) -> str:
    """The table does not tell which they are: the examples are encoded again, up to the first."""
    for _, example in split_examples(recipe.data, base, split):
        for row in objective.encode(example):
            if not isinstance(row, Dropped) and row["truncated"]:
                return str(example.place)
    raise AssertionError("the table counts truncated rows, but no example gives one")


def show(found: Preview, console: Console) -> None:
    """On a terminal what is trained is green, elsewhere it stands in [[…]]."""
    for number, one in enumerate(found.samples, start=1):
        console.print(Text(f"{found.split} sample {number}: {one.place}", style="bold"))
        for part in one.parts:
            line = Text(f"  {part.name}: ", style="cyan")
            for text, trained in part.pieces:
                if console.is_terminal:
                    line.append(_visible(text), style="bold green" if trained else "default")
                else:
                    line.append(f"[[{_visible(text)}]]" if trained else _visible(text))
            console.print(line, soft_wrap=True)
        console.print(Text(f"  {one.about}", style="dim"), soft_wrap=True)
        console.print()
    for line in _summary(found):
        console.print(Text(line), soft_wrap=True)


def _summary(found: Preview) -> Iterator[str]:
    yield f"{found.rows:,} {found.split} rows by their tokens (max_length {found.max_length:,}):"
    yield from bars(found.lengths, found.max_length)
    if (packing := found.packing) is not None:
        yield (
            f"packing: {packing.sequences:,} sequences in {packing.steps:,} steps, {packing.efficiency:.1%} of their "
            f"{packing.max_length:,} places are filled"
        )
    yield from found.notes


def bars(lengths: Sequence[Bin], max_length: int) -> Iterator[str]:
    """The histogram as text, with the bin of `max_length` marked."""
    most = max(one.rows for one in lengths)
    wide = len(f"{lengths[-1].last:,}")
    for one in lengths:
        bar = "#" * max(round(_BAR * one.rows / most), one.rows > 0)
        mark = " ← max_length" if one.first <= max_length <= one.last else ""
        yield f"  {one.first:>{wide},}–{one.last:<{wide},} {bar:<{_BAR}} {one.rows:,}{mark}".rstrip()


def _visible(text: str) -> str:
    """Control characters as escapes, so that a row cannot steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
