"""What `tunesmith check` finds in the encoded rows: labels, coverage, what is left out, leakage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.batch import IGNORED
from tunesmith.commands.findings import Finding, error, fine, warning
from tunesmith.data.order import Salt
from tunesmith.data.prepare import Dataset
from tunesmith.objectives import Objective
from tunesmith.objectives.classification import ClassificationObjective
from tunesmith.objectives.question_answering import QuestionAnsweringObjective
from tunesmith.objectives.sft import SFTObjective
from tunesmith.objectives.token_classification import TokenClassificationObjective
from tunesmith.recipe import Recipe

LOOKED_AT = 2000  # rows of a split, evenly spread, where looking at all of them could take long
_FEW_CLASSES = 8


def data_findings(recipe: Recipe, datasets: Mapping[str, Dataset], objective: Objective) -> Iterator[Finding]:
    for name, dataset in datasets.items():
        yield from _counts(recipe, name, dataset)
        yield from _labels(name, dataset, objective)
        yield from _coverage(name, dataset, objective)
    if isinstance(objective, SFTObjective):
        yield end_marker(datasets["train"], objective)
    yield from leakage(datasets)
    rows, batch = len(datasets["train"]), recipe.training.global_batch_size
    if rows < batch:
        yield warning(
            "train", f"{rows} rows are less than one batch of {batch}", "lower training.global_batch_size"
        )


def spread(rows: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the row numbers below `rows`, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, rows - 1, min(rows, most)).round().astype(np.int64))


def _counts(recipe: Recipe, name: str, dataset: Dataset) -> Iterator[Finding]:
    facts = dataset.facts
    files = len(dataset.table.meta["files"])
    longest = int(dataset.table.lengths().max())
    yield fine(
        name,
        f"{len(dataset):,} rows of {facts['examples']:,} examples from {files} source{'s' * (files != 1)}, "
        f"{facts['tokens']:,} tokens, the longest row {longest:,}",
    )
    for reason, count in facts["dropped"].items():
        place = facts["dropped_example"].get(reason)
        example = f" (such as {place})" if place else ""
        fix = "raise data.max_length" if "max_length" in reason else "repair or remove them, or leave it so"
        yield warning(name, f"{count:,} dropped: {reason}{example}", fix)
    if cut := facts["truncated"]:
        share = cut / len(dataset)
        yield warning(
            name,
            f"{cut:,} rows ({share:.1%}) are cut to max_length {recipe.data.max_length}",
            "raise data.max_length, or drop them with data.truncation: drop",
        )
    for what, count in facts["changed"].items():
        yield warning(name, f"{count:,} changed: {what}", "look at these rows")


def _labels(name: str, dataset: Dataset, objective: Objective) -> Iterator[Finding]:
    match objective:
        case ClassificationObjective(problem="regression"):
            yield _numbers(name, np.stack(dataset.table.column("numbers")))
        case ClassificationObjective():
            yield from _classes(
                name, "labels", _count(dataset, "labels", len(objective.labels)), objective.labels
            )
        case TokenClassificationObjective():
            yield from _classes(
                name, "tags", _count(dataset, "tags", len(objective.labels)), objective.labels
            )
        case QuestionAnsweringObjective():
            table = dataset.table
            answered = sum(
                table.value("offsets", row)[2 * table.value("start", row)] >= 0 for row in range(len(table))
            )
            text = f"{answered:,} of {len(table):,} windows hold the answer"
            fix = "check answers and their answer_start"
            yield fine(name, text) if answered else error(name, text, fix)
        case _:
            pass


def _count(dataset: Dataset, column: str, classes: int) -> NDArray[np.int64]:
    found = np.concatenate([np.zeros(0, np.int64), *dataset.table.column(column)])
    return np.bincount(found.astype(np.int64), minlength=classes)


def _classes(name: str, what: str, counts: NDArray[np.int64], labels: list[str]) -> Iterator[Finding]:
    order = np.argsort(-counts, kind="stable")
    if len(labels) <= _FEW_CLASSES:
        shown = ", ".join(f"{labels[i]} {counts[i]:,}" for i in order)
    else:
        most, least = order[0], order[-1]
        shown = f"from {labels[most]} {counts[most]:,} to {labels[least]} {counts[least]:,}"
    yield fine(name, f"{len(labels)} {what}: {shown}")
    rare = [labels[i] for i in order if counts[i] < 2]
    if rare and name == "train":
        text = f"{len(rare)} {what} with fewer than 2 rows: {_few(rare)}"
        yield warning(name, text, "add rows of them, or leave them out")
    elif missing := [label for label, count in zip(labels, counts, strict=True) if count == 0]:
        yield warning(
            name, f"no row with {_few(missing)}", "no metric tells how well they are learnt: add rows"
        )


def _numbers(name: str, values: NDArray[Any]) -> Finding:
    low, high, mean = float(values.min()), float(values.max()), float(values.mean())
    text = (
        f"targets from {low:.4g} to {high:.4g}, mean {mean:.4g}, standard deviation {float(values.std()):.4g}"
    )
    if low == high and name == "train":
        return error(name, f"every target is {low:.4g}", "check data.train.columns: label")
    return fine(name, text)


def _coverage(name: str, dataset: Dataset, objective: Objective) -> Iterator[Finding]:
    """The share of the tokens that the loss looks at, as the first epoch draws them."""
    rows = spread(len(dataset), LOOKED_AT)
    first = objective.draw(dataset.table.row(0), (0, 0, 0, Salt.ROW))
    if "labels" not in first or isinstance(objective, ClassificationObjective):
        return
    labelled = tokens = 0
    for row in rows.tolist():
        labels = np.asarray(objective.draw(dataset.table.row(row), (0, 0, row, Salt.ROW))["labels"])
        labelled += int((labels != IGNORED).sum())
        tokens += len(labels)
    of = "" if len(rows) == len(dataset) else f" (in {len(rows):,} rows looked at)"
    text = f"{labelled:,} of {tokens:,} label positions are trained, {labelled / max(tokens, 1):.1%}{of}"
    yield (
        fine(name, text) if labelled else error(name, text, "no token would be learnt: check the rows' roles")
    )


def end_marker(dataset: Dataset, objective: SFTObjective) -> Finding:
    """Whether the answers' last labelled tokens hold a marker that ends a generation."""
    stops, texts = set(objective.stop_token_ids()), objective.stop_strings()
    rows = spread(len(dataset), LOOKED_AT).tolist()
    learnt = 0
    for row in rows:
        labels = np.asarray(dataset.table.value("labels", row))
        tail = [int(label) for label in labels[labels != IGNORED][-32:]]
        text: str = objective.tokenizer.decode(tail) if texts else ""
        learnt += bool(stops.intersection(tail[-4:])) or any(stop in text for stop in texts)
    marker = objective.template.final_marker.strip() or objective.template.end_marker.strip()
    if learnt == len(rows):
        return fine("train", f"every answer ends with a marker that is learnt ({marker})")
    level = warning if learnt else error
    return level(
        "train",
        f"{len(rows) - learnt:,} of {len(rows):,} rows do not teach an end ({marker}): generation would not stop",
        "set model.chat_template: chatml",
    )


def leakage(datasets: Mapping[str, Dataset]) -> Iterator[Finding]:
    """Rows of one split whose input is, token for token, that of a row of another."""
    hashes = {name: _hashes(dataset) for name, dataset in datasets.items()}
    pairs = [("train", "eval"), ("train", "test"), ("eval", "test")]
    for earlier, later in ((a, b) for a, b in pairs if a in hashes and b in hashes):
        known = {digest: row for row, digest in reversed(list(enumerate(hashes[earlier])))}
        shared = [(row, known[digest]) for row, digest in enumerate(hashes[later]) if digest in known]
        if not shared:
            yield fine(later, f"no input is also in {earlier}")
            continue
        row, twin = shared[0]
        yield warning(
            later,
            f"{len(shared):,} of {len(hashes[later]):,} inputs ({len(shared) / len(hashes[later]):.1%}) are also in "
            f"{earlier}: {datasets[later].place(row)} is {datasets[earlier].place(twin)}",
            f"remove them from one: they flatter the metrics of {later}",
        )


def _hashes(dataset: Dataset) -> list[bytes]:
    table = dataset.table
    return [
        hashlib.blake2b(table.value("input_ids", row).tobytes(), digest_size=12).digest()
        for row in range(len(table))
    ]


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
